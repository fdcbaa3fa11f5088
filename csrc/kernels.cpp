// Compiled once per instruction set; see setup.py for the flags.
#include "kernels.h"

#include "attention_backward.h"
#include "attention_forward.h"
#include "distance.h"

namespace LK_ISA {

template <class S>
constexpr AttentionKernels kAttention = {
    sizeof(Compute<S>),    kInPlace<S>,         forward_scratch<S>,
    backward_scratch<S>,   forward_queries<S>,  attention_forward<S>,
    attention_backward<S>, attention_reduce<S>, reduce_scratch<S>,
    attention_sinks<S>};
template <class S>
constexpr DistanceKernels kDistance = {distance_forward<S>, distance_backward<S>};

// In the order of LkDtype.
extern const KernelTable kTable;
const KernelTable kTable = {
    {kAttention<float>, kAttention<double>, kAttention<Bfloat16>, kAttention<Float16>},
    {kDistance<float>, kDistance<double>, kDistance<Bfloat16>, kDistance<Float16>}};

}  // namespace LK_ISA
