// One matrix product under linear, matmul and conv2d: C[m,n] = A[m,k] B[k,n], float32 sums over blocks of k in a fixed order.
// Operands are seen only through Rows, so a transposed matrix, an im2col view and a flipped kernel are all a few lines of
// Rows; the result leaves through Output, which rounds it to the storage type once.
#pragma once
#include "simd.h"

namespace sdxl::ARCH {

// Elements to a 32-bit word: a float, or with AVX-512 two bfloat16 neighbours along k.
template <class T> constexpr int PAIR = 1;
#if defined(ARCH_avx512)
template <> constexpr int PAIR<bf16> = 2;
#endif

struct Range {
  int64_t begin, end;
  int count() const { return int(end - begin); }
};

// Rows [first, first + count) of a tile at some columns of it, `stride` elements apart in memory.
template <class T> struct Strip {
  const T *data;
  int64_t stride;
  int first, count;
  Range columns;
};
constexpr int MAX_STRIPS = 512;

// A logical matrix.
template <class T> struct Rows {
  // to[i]: the elements `columns` of row rows.begin + i, in place or gathered into scratch + i * columns.count().
  virtual void fetch(const T **to, Range rows, Range columns, T *scratch) const = 0;
  // The same in place, as strips whose first counts from rows.begin; what no strip covers is zero. -1: it must be fetched.
  virtual int strips(Strip<T> *to, Range rows, Range columns) const = 0;
  // Columns that lie together: blocks of columns should not cross a multiple of it. 0: all of them do.
  virtual int64_t run() const { return 0; }
};

// Rows that far apart can be read in place, as words.
template <class T> constexpr bool in_words(int64_t stride) { return stride % PAIR<T> == 0; }

template <class T> struct Matrix final : Rows<T> {
  const T *data;
  int64_t stride;
  Matrix(const T *data, int64_t stride) : data(data), stride(stride) {}
  void fetch(const T **to, Range rows, Range columns, T *) const override {
    for (int i = 0; i < rows.count(); i++) to[i] = data + (rows.begin + i) * stride + columns.begin;
  }
  int strips(Strip<T> *to, Range rows, Range columns) const override {
    if (!in_words<T>(stride)) return -1;
    to[0] = {data + rows.begin * stride + columns.begin, stride, 0, rows.count(), columns};
    return 1;
  }
};

// `rows_are_k`: the rows of the view run along k (columns along m or n); otherwise its columns run along k.
template <class T> struct Operand {
  const Rows<T> &rows;
  bool rows_are_k;
};

enum Activation : int { NONE = 0, SILU = 1, GELU = 2, QUICK_GELU = 3, GEGLU = 4 };

// Columns of a GEGLU product come in blocks: GEGLU_BLOCK of h, then the GEGLU_BLOCK gates that belong to them.
constexpr int GEGLU_BLOCK = 32;

// Where row r of C goes: pixel (r / width % height, r % width) of a grid laid over every `step`th pixel of an image.
struct Grid {
  int64_t height = 1, width = 1, step = 1, top = 0, left = 0, image_height = 0, image_width = 0;
  int64_t place(int64_t r) const {
    if (image_width == 0) return r;
    const int64_t y = r / width % height * step + top, x = r % width * step + left;
    return (r / (height * width) * image_height + y) * image_width + x;
  }
};

// y[row, col] = activation(sum + bias[col] + shift[row / rows_per_shift, col]) + residual[row, col]; absent parts are null.
template <class T> struct Output {
  T *y;
  int64_t columns;
  const T *bias = nullptr;
  const T *shift = nullptr;
  int64_t rows_per_shift = 1;
  const T *residual = nullptr;
  int activation = NONE;
  Grid grid{};
};

template <class T>
void gemm(const Output<T> &c, const Operand<T> &a, const Operand<T> &b, int64_t m, int64_t n, int64_t k);

} // namespace sdxl::ARCH
