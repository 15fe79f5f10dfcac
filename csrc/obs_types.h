// What an elimination is told and what it keeps, for its kernels (obs.cuh) and who calls them.
#pragma once

#include <cstdint>

namespace fishleg_ext {

// What an elimination is asked to do, beside its arrays.
template <typename T>
struct EliminateOptions {
  int64_t num_blocks;      // K
  int size;                // B
  int64_t inverse_stride;  // elements from one block's inverse to the next; 0 where all share one
  int group;               // weights that are eliminated together, g: see with_group
  int n, m;                // keep n of each m weights; m = 0 where there is no such pattern
  T stop;                  // a block ends when its next cost exceeds this
  bool dead_first;         // the inverse is that of the whole block: eliminate the dead first
};

// What an elimination of groups of g weights, in panels of P steps, keeps between panels.
template <typename T>
struct PanelState {
  T* weight;      // [K, B], 0 where dead
  T* variance;    // [K, B, g], of what is left of H the g x g blocks on the diagonal, lower halves
  bool* pending;  // [K, B]
  int32_t* next;  // [K], ranks given so far
  T* columns;     // [K, P, B], written from the first on, zeros at the end
  int panel;      // P
  int32_t* rank;  // [K, B]
  T* cost;        // [K, B]
};

}  // namespace fishleg_ext
