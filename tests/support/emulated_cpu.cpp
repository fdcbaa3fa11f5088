// Calls one function of a compiled library in an emulator, for emulated_cpu.py.
//
//     emulated_cpu LIBRARY                        prints its instruction sets
//     emulated_cpu LIBRARY FUNCTION CALL RESULT   carries out a call
//
// CALL: the size of the argument structure and its bytes; the number of buffers and, for each, the
// offset of its pointer in the structure, its size and its bytes. Numbers are int64. RESULT: the
// status, then the bytes of all buffers.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

namespace {

int64_t read_number(FILE* file) {
  int64_t number = 0;
  return std::fread(&number, sizeof(number), 1, file) == 1 ? number : 0;
}

std::vector<char> read_bytes(FILE* file) {
  std::vector<char> bytes(read_number(file));
  if (std::fread(bytes.data(), 1, bytes.size(), file) != bytes.size()) bytes.clear();
  return bytes;
}

}  // namespace

int main(int argc, char** argv) {
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  if (argc < 5) {
    const auto name = reinterpret_cast<const char* (*)(int32_t)>(dlsym(library, "lk_isa_name"));
    for (int32_t i = 0; name(i); ++i) std::puts(name(i));
    return 0;
  }
  FILE* call = std::fopen(argv[3], "rb");
  std::vector<char> arguments = read_bytes(call);
  std::vector<std::vector<char>> buffers(read_number(call));
  for (std::vector<char>& buffer : buffers) {
    const int64_t offset = read_number(call);
    buffer = read_bytes(call);
    const void* data = buffer.data();
    std::memcpy(arguments.data() + offset, &data, sizeof(data));
  }
  const auto function = reinterpret_cast<int32_t (*)(const void*)>(dlsym(library, argv[2]));
  const int64_t status = function(arguments.data());

  FILE* result = std::fopen(argv[4], "wb");
  std::fwrite(&status, sizeof(status), 1, result);
  for (const std::vector<char>& buffer : buffers) {
    std::fwrite(buffer.data(), 1, buffer.size(), result);
  }
  return std::fclose(result);
}
