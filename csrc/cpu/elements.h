// Elements of dense tensors, piece by piece, between storage and the accumulation type; without a copy where they are
// stored so.
#pragma once

#include "pieces.h"

namespace rk::cpu {

template <class A>
struct Buffer {
  alignas(64) A element[kPiece];
};

class Input {
 public:
  explicit Input(const Tensor& t)
      : base_(pointer<char>(t)), dtype_(t.scalar_type()), item_(static_cast<int64_t>(t.element_size())) {}

  // Elements [begin, begin + n), n <= kPiece.
  template <class A>
  const A* read(int64_t begin, int64_t n, Buffer<A>& buffer) const {
    const char* from = base_ + begin * item_;
    if (item_ == sizeof(A)) return reinterpret_cast<const A*>(from);
    read_piece(dtype_, from, buffer.element, n);
    return buffer.element;
  }

 private:
  const char* base_;
  ScalarType dtype_;
  int64_t item_;
};

// A thread that has closed pieces ends with finish_streams.
class Output {
 public:
  // What is not needed goes to the buffer and no further.
  Output(const Tensor& t, bool needed)
      : base_(needed ? pointer<char>(t) : nullptr),
        dtype_(t.scalar_type()),
        item_(static_cast<int64_t>(t.element_size())),
        streamed_(t.numel() * item_ >= kStreamedBytes) {}

  // Where a piece is to be written, before it is, and what to do after.
  template <class A>
  A* open(int64_t begin, Buffer<A>& buffer) const {
    return base_ && item_ == sizeof(A) && !streamed_ ? reinterpret_cast<A*>(base_ + begin * item_) : buffer.element;
  }
  template <class A>
  void close(int64_t begin, int64_t n, const Buffer<A>& buffer) const {
    if (!base_) return;
    if (item_ != sizeof(A))
      write_piece(dtype_, buffer.element, base_ + begin * item_, n);
    else if (streamed_)
      stream_piece(buffer.element, base_ + begin * item_, n * item_);
  }

 private:
  char* base_;
  ScalarType dtype_;
  int64_t item_;
  bool streamed_;
};

}  // namespace rk::cpu
