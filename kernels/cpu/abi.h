// What every kernel file shares: the three storage types, and the table through which a kernel is found by name.
// A kernel is a plain function template over its storage type; EXPORT_FLOATS stamps `<op>_<direction>_<dtype>` entries
// whose signature (p pointer, i int, f float, d double) is deduced from the function type, so the library is its own manifest.
// Each file is compiled once per instruction set with ARCH naming the namespace; the loader picks a table at run time.
#pragma once
#include <cstdint>
#include <cstring>

// The library's own memory (library.cc).
extern "C" {
void *sdxl_alloc(int64_t bytes);
void sdxl_free(void *memory);
}

namespace sdxl {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

struct Entry {
  const char *arch;
  const char *symbol;
  char signature[40];
  void *function;
  Entry *next;
};

// Defined in library.cc, which is compiled once for every CPU.
void add_entry(Entry *entry);

template <class A> constexpr char letter_of() {
  if constexpr (__is_same(A, int)) return 'i';
  else if constexpr (__is_same(A, float)) return 'f';
  else if constexpr (__is_same(A, double)) return 'd';
  else return 'p';
}

struct Registrar {
  Entry entry;
  template <class... A> Registrar(const char *arch, const char *symbol, void (*function)(A...)) {
    static_assert(sizeof...(A) < sizeof(entry.signature), "longer signature than an entry holds");
    entry.arch = arch;
    entry.symbol = symbol;
    const char letters[] = {letter_of<A>()..., 0};
    memcpy(entry.signature, letters, sizeof letters);
    entry.function = reinterpret_cast<void *>(function);
    add_entry(&entry);
  }
};

} // namespace sdxl

#define SDXL_TEXT_(x) #x
#define SDXL_TEXT(x) SDXL_TEXT_(x)

// EXPORT(cast_to_float32_forward_bfloat16, cast<float, bf16>)
#define EXPORT(symbol, ...) \
  static ::sdxl::Registrar registrar_##symbol(SDXL_TEXT(ARCH), #symbol, &__VA_ARGS__);

// One entry per storage type: fn must be a template over T alone.
#define EXPORT_FLOATS(base, fn) \
  EXPORT(base##_float32, fn<float>) EXPORT(base##_bfloat16, fn<::sdxl::bf16>) EXPORT(base##_float16, fn<::sdxl::f16>)
