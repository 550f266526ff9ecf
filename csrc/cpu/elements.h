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
  Input() = default;
  explicit Input(const Tensor& t)
      : base_(pointer<char>(t)), dtype_(t.scalar_type()), item_(item_size(t.scalar_type())) {}
  explicit Input(const std::optional<Tensor>& t) : Input(t ? Input(*t) : Input()) {}

  explicit operator bool() const { return base_; }
  // Whether reading copies nothing.
  template <class A>
  bool holds() const {
    return item_ == sizeof(A);
  }

  template <class A>
  const A* at(int64_t begin) const {
    return reinterpret_cast<const A*>(base_ + begin * item_);
  }
  template <class A>
  void copy(int64_t begin, int64_t n, A* to) const {
    read_piece(dtype_, base_ + begin * item_, to, n);
  }

  // Elements [begin, begin + n), n <= kPiece.
  template <class A>
  const A* read(int64_t begin, int64_t n, Buffer<A>& buffer) const {
    if (holds<A>()) return at<A>(begin);
    copy(begin, n, buffer.element);
    return buffer.element;
  }

 private:
  const char* base_ = nullptr;
  ScalarType dtype_ = ScalarType::Float;
  int64_t item_ = 0;
};

// Rows at any distance.
struct InputRows {
  Input elements;
  int64_t stride = 0;

  InputRows() = default;
  explicit InputRows(const Tensor& t) : elements(t), stride(t.stride(0)) {}

  template <class A>
  const A* read(int64_t row, int64_t begin, int64_t n, Buffer<A>& buffer) const {
    return elements.read(row * stride + begin, n, buffer);
  }
};

// A thread that has closed pieces ends with finish_streams.
class Output {
 public:
  Output() = default;
  // What is not needed goes to the buffer and no further.
  Output(const Tensor& t, bool needed) : Output(t, needed, is_large(t)) {}
  // `streamed`: past the caches.
  Output(const Tensor& t, bool needed, bool streamed)
      : base_(needed ? pointer<char>(t) : nullptr),
        dtype_(t.scalar_type()),
        item_(item_size(t.scalar_type())),
        streamed_(streamed) {}

  static bool is_large(const Tensor& t) { return t.numel() * item_size(t.scalar_type()) >= kStreamedBytes; }

  explicit operator bool() const { return base_; }

  // Where a piece is to be written, before it is, and what to do after.
  template <class A>
  A* open(int64_t begin, Buffer<A>& buffer) const {
    return in_place<A>() ? at<A>(begin) : buffer.element;
  }
  template <class A>
  void close(int64_t begin, int64_t n, const Buffer<A>& buffer) const {
    if (!base_) return;
    if (item_ != sizeof(A))
      write_piece(dtype_, buffer.element, base_ + begin * item_, n);
    else if (streamed_)
      stream_piece(buffer.element, base_ + begin * item_, n * item_);
  }
  // f(piece) writes it.
  template <class A, class F>
  void write(int64_t begin, int64_t n, Buffer<A>& buffer, const F& f) const {
    if (in_place<A>()) return f(at<A>(begin));
    f(buffer.element);
    close(begin, n, buffer);
  }

 private:
  template <class A>
  bool in_place() const {
    return base_ && item_ == sizeof(A) && !streamed_;
  }
  template <class A>
  A* at(int64_t begin) const {
    return reinterpret_cast<A*>(base_ + begin * item_);
  }

  char* base_ = nullptr;
  ScalarType dtype_ = ScalarType::Float;
  int64_t item_ = 0;
  bool streamed_ = false;
};

// f(begin, n) for the pieces of [0, size).
template <class F>
void for_pieces(int64_t size, const F& f) {
  for (int64_t begin = 0; begin < size; begin += kPiece) f(begin, std::min(kPiece, size - begin));
}

}  // namespace rk::cpu
