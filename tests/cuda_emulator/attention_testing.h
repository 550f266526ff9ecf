// What the tests of attention's kernels share: shapes, and tensors as kernels take them.
#pragma once

#include "attention_tiles.cuh"
#include "testing.h"

namespace testing {

struct Shape {
  int batch, heads, key_heads, queries, keys, key_size, value_size;
};

// A tensor [B, H, N, size], heads outside or, as a projection leaves them, inside.
template <class S>
struct Tensor {
  std::int64_t heads, rows;
  int size;
  bool inside;
  Buffer<S> data;

  Tensor(Draw& draw, int batch, int head_count, int row_count, int columns, int most_offset)
      : heads(head_count),
        rows(row_count),
        size(columns),
        inside(draw(0, 1)),
        data(batch * heads * rows * size, draw(0, most_offset)) {}

  std::int64_t index(std::int64_t b, std::int64_t h, std::int64_t i) const {
    return inside ? ((b * rows + i) * heads + h) * size : ((b * heads + h) * rows + i) * size;
  }
  double at(std::int64_t b, std::int64_t h, std::int64_t i, int d) const { return to_double(data[index(b, h, i) + d]); }
  template <class T>
  rk::cuda::Heads<T> view() const {
    T* const start = const_cast<S*>(data.data());
    return {{start, static_cast<int>(inside ? heads * size : size), static_cast<int>(rows), size},
            heads * rows * size,
            inside ? size : rows * size};
  }
  bool aligned() const { return rk::cuda::aligned<S>(size, data.data()); }
};

inline Shape draw_shape(Draw& draw, int most_rows, int most_size) {
  const int key_heads = draw(1, 2), group = draw(1, 2);
  Shape s{draw(1, 2),         key_heads * group,  key_heads,         draw(1, most_rows),
          draw(1, most_rows), draw(1, most_size), draw(1, most_size)};
  if (draw(0, 1)) s.key_size = s.value_size = (s.key_size + 7) / 8 * 8;  // whole vectors
  return s;
}

// test(S(), shape) for numbers S and shapes that take every kernel.
template <class Test>
void for_shapes(const Options& options, Draw& draw, const Test& test) {
  for (int round = 0; round < options.rounds; ++round) {
    test(__nv_bfloat16(), draw_shape(draw, 40, 32));
    test(__half(), draw_shape(draw, 40, 64));
    if (round % 3 == 0) test(float(), draw_shape(draw, 40, 64));
    if (round % 3 == 1) test(double(), draw_shape(draw, 40, 32));
    if (round % 3 == 2) test(__nv_bfloat16(), draw_shape(draw, 40, 128));
  }
  if (options.rounds <= 3) return;
  test(__nv_bfloat16(), Shape{1, 2, 1, 150, 100, 96, 96});
  test(__half(), Shape{1, 1, 1, 100, 150, 128, 128});
  test(float(), Shape{1, 1, 1, 70, 40, 64, 50});
}

}  // namespace testing
