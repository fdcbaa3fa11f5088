// Compiled once per instruction set; see setup.py for the flags.
#include "kernels.h"

#include "attention_backward.h"
#include "attention_forward.h"
#include "pairs.h"
#include "tubes.h"

namespace LK_ISA {

template <class S>
constexpr AttentionKernels kAttention = {
    sizeof(Compute<S>),    kInPlace<S>,         forward_scratch<S>,
    backward_scratch<S>,   forward_queries<S>,  attention_forward<S>,
    attention_backward<S>, attention_reduce<S>, reduce_scratch<S>,
    attention_sinks<S>};
#ifdef __AVX512BF16__

// All else is that of AVX-512.
extern const AttentionKernels kBfloat16Attention;
const AttentionKernels kBfloat16Attention = kAttention<Bfloat16>;

#else

template <class S>
constexpr PairKernels kPairs = {distance_forward<S>,  distance_reduce<S>, distance_backward<S>,
                                views_forward<S>,     views_dot<S>,       views_backward<S>};
template <class S>
constexpr TubeKernels kTubes = {tubes_forward<S>, tubes_backward<S>};

// In the order of LkDtype.
extern const KernelTable kTable;
const KernelTable kTable = {
    {kAttention<float>, kAttention<double>, kAttention<Bfloat16>, kAttention<Float16>},
    {kPairs<float>, kPairs<double>, kPairs<Bfloat16>, kPairs<Float16>},
    {kTubes<float>, kTubes<double>, kTubes<Bfloat16>, kTubes<Float16>}};

#endif

}  // namespace LK_ISA
