// How far another class is ahead of the right one, of logits z and the right class y:
//
//   cw    loss = z_o - z_y                     d loss = e_o - e_y
//   dlr   loss = (z_o - z_y) / s               d loss = (e_o - e_y - loss ds) / s
//
// o is the best class but y, or given.  s = z_(1) - z_(3), or z_(1) - (z_(3) + z_(4)) / 2 where o is given, of the sorted
// logits; where s = 0, loss and slope are zero.  Among equal logits the lower class comes first.
#pragma once

#include "scalar.h"

namespace rk {

enum class Margin : std::int64_t { kCw, kDlr };

// The four largest logits and their classes, as they are met in order.
template <class A, class Index = std::int64_t>
struct Leaders {
  A value[4];
  Index index[4];

  RK_HOST_DEVICE Leaders() {
    for (int k = 0; k < 4; ++k) value[k] = -Limits<A>::largest * A(2), index[k] = -1;
  }
  // Class c and its logit; classes may come in any order.
  RK_HOST_DEVICE void meet(A z, Index c) {
    for (int k = 0; k < 4; ++k)
      if (index[k] < 0 || z > value[k] || (z == value[k] && c < index[k])) {
        const A other = value[k];
        const Index other_index = index[k];
        value[k] = z, index[k] = c;
        z = other, c = other_index;
        if (c < 0) return;
      }
  }
};

// The loss and what its slope is at each class: sum of weights of the classes that count.
template <class A, class Index = std::int64_t>
struct MarginSlopes {
  A loss, plus, minus, top, third, fourth;  // slopes at o, y, (1), (3) and (4)
  Index other, own, top_index, third_index, fourth_index;

  RK_HOST_DEVICE MarginSlopes(Margin kind, const Leaders<A, Index>& best, Index y, A z_y, Index o, A z_o, bool given)
      : other(o), own(y), top_index(best.index[0]), third_index(best.index[2]), fourth_index(best.index[3]) {
    top = third = fourth = A(0);
    loss = z_o - z_y;
    plus = A(1);
    if (kind == Margin::kDlr) {
      const A s = best.value[0] - (given ? A(0.5) * (best.value[2] + best.value[3]) : best.value[2]);
      const A inverse = s == A(0) ? A(0) : A(1) / s;
      loss = s == A(0) ? A(0) : loss / s;
      plus = inverse;
      top = -loss * inverse;
      third = given ? A(0.5) * loss * inverse : loss * inverse;
      fourth = given ? third : A(0);
    }
    minus = -plus;
  }

  RK_HOST_DEVICE A at(Index c) const {
    A slope = c == other ? plus : A(0);
    slope += c == own ? minus : A(0);
    slope += c == top_index ? top : A(0);
    slope += c == third_index ? third : A(0);
    return slope + (c == fourth_index ? fourth : A(0));
  }
};

}  // namespace rk
