// Greedy elimination and masked solves of symmetric blocks, a block at a time.
//
// What grows with B^3 is one routine, `subtract_panel`: from the lower half of a matrix it
// subtracts U^T U, U being the columns of up to kPanel eliminations. Tiles of it stay in vector
// registers. What an elimination step does besides is O(B * kPanel): it brings one column up to
// date, finds the cheapest weight, and moves the last row and column into the place of those
// eliminated, so that what is left of the inverse is always the leading part of the array: of B
// weights the arithmetic is B^3 / 3 operations, no more than the symmetric updates need.
//
// Reductions are never reordered by the compiler (no fast-math): NaN and ties keep their meaning.

#include "cpu_obs.h"

#include <cmath>
#include <cstring>

#include "cpu_panels.h"

namespace fishleg_ext {
namespace FISHLEG_EXT_INSTRUCTION_SET {
namespace {

constexpr int kMostGroup = 64;  // weights that are eliminated together

// What is left of one block while its weights are eliminated. Arrays are by position, but those by
// index are by the place of the weight in the block.
template <typename T>
class Elimination {
 public:
  Elimination(Workspace& workspace, int size, const EliminateOptions<T>& options)
      : size_(size), ld_(leading_dimension<T>(size)), options_(options) {
    h_ = workspace.take<T>(int64_t{size} * ld_);
    u_ = workspace.take<T>(kPanel * ld_);
    packed_ = workspace.take<T>(packed_elements<T>(size));
    weight_ = workspace.take<T>(ld_);
    variance_ = workspace.take<T>(ld_);
    closed_ = workspace.take<T>(ld_);
    costs_ = workspace.take<T>(ld_);
    tiles_ = workspace.take<T>(options.group > 1 ? int64_t{size} * options.group : 0);
    index_ = workspace.take<int32_t>(ld_);
    position_ = workspace.take<int32_t>(size);
    open_ = workspace.take<int32_t>(size);
  }

  // Eliminates one block; arrays of the block.
  void run(const T* weight, const T* inverse, int64_t stride, const bool* alive, int32_t* rank,
           T* cost) {
    begin(weight, inverse, stride, alive, rank, cost);
    if (options_.dead_first) {
      for (int index = 0; index < size_; ++index) {
        if (!alive[index]) eliminate(position_[index], false);
      }
    }
    const int group = options_.group;
    if (group > 1) begin_tiles();
    for (int32_t done = 0; num_left_ > 0;) {
      T best;
      const int chosen = group > 1 ? cheapest_group(&best) : cheapest(&best);
      if (chosen < 0 || best > options_.stop) break;
      if (group > 1) {
        int members = 0;
        for (int i = chosen; i < chosen + group; ++i) members += position_[i] >= 0;
        for (int i = chosen; i < chosen + group; ++i) {
          if (position_[i] < 0) continue;
          rank[i] = done++;
          cost[i] = best / static_cast<T>(members);
          eliminate(position_[i], true);
          update_tiles();
        }
      } else {
        rank[chosen] = done++;
        cost[chosen] = best;
        close_tuple_of(chosen);
        eliminate(position_[chosen], true);
      }
    }
  }

 private:
  void begin(const T* weight, const T* inverse, int64_t stride, const bool* alive, int32_t* rank,
             T* cost) {
    num_left_ = depth_ = 0;
    for (int i = 0; i < size_; ++i) {
      rank[i] = alive[i] ? size_ : -1;
      cost[i] = INFINITY;
      position_[i] = -1;
      if (!alive[i] && !options_.dead_first) continue;
      position_[i] = num_left_;
      index_[num_left_++] = i;
    }
    for (int64_t p = 0; p < ld_; ++p) {
      const bool here = p < num_left_;
      const int i = here ? index_[p] : 0;
      const bool counts = here && alive[i];
      weight_[p] = counts ? weight[i] : T{0};
      variance_[p] = here ? inverse[i * stride + i] : T{0};
      closed_[p] = counts ? T{0} : INFINITY;
    }
    for (int r = 0; r < num_left_; ++r) {
      const T* row = inverse + index_[r] * stride;
      T* to = h_ + r * ld_;
      if (num_left_ == size_) {
        std::memcpy(to, row, (r + 1) * sizeof(T));
      } else {
        for (int c = 0; c <= r; ++c) to[c] = row[index_[c]];
      }
    }
    if (options_.m == 0) return;
    for (int start = 0; start < size_; start += options_.m) {
      int left = 0;
      for (int i = start; i < start + options_.m; ++i) left += alive[i];
      open_[start / options_.m] = left - options_.n;
      if (left <= options_.n) close_tuple(start);
    }
  }

  // Of each m weights n are kept: what is left is closed once so many have been eliminated.
  void close_tuple_of(int index) {
    if (options_.m == 0) return;
    const int tuple = index / options_.m;
    if (--open_[tuple] <= 0) close_tuple(tuple * options_.m);
  }

  void close_tuple(int start) {
    for (int i = start; i < start + options_.m; ++i) {
      if (position_[i] >= 0) closed_[position_[i]] = INFINITY;
    }
  }

  // Index of the cheapest weight, of ties the first; -1 where none is left.
  int cheapest(T* best) {
    using V = typename Vec<T>::Type;
    constexpr int lanes = Vec<T>::kLanes;
    const V infinity = static_cast<T>(INFINITY) - V{};
    V least = infinity;
    for (int c = 0; c < num_left_; c += lanes) {
      const V weight = load(weight_ + c), variance = load(variance_ + c);
      V cost = weight * weight / (2 * variance) + load(closed_ + c);
      cost = variance > 0 ? cost : infinity;
      store(costs_ + c, cost);
      least = cost < least ? cost : least;  // NaN is never less
    }
    T minimum = INFINITY;
    for (int lane = 0; lane < lanes; ++lane)
      minimum = least[lane] < minimum ? least[lane] : minimum;
    *best = minimum;
    if (!(minimum < static_cast<T>(INFINITY))) return -1;
    int32_t first = size_;
    for (int c = 0; c < num_left_; ++c) {
      const int32_t index = costs_[c] == minimum ? index_[c] : size_;
      first = index < first ? index : first;
    }
    return first;
  }

  // The g x g blocks on the diagonal of what is left, [g, g] of each group, by index.
  void begin_tiles() {
    const int g = options_.group;
    for (int i = 0; i < size_; ++i) {
      for (int j = i / g * g; j <= i; ++j) {
        int p = position_[i], q = position_[j];
        if (p < 0 || q < 0) continue;
        if (p < q) {
          const int other = p;
          p = q;
          q = other;
        }
        T value = h_[p * ld_ + q];
        for (int d = 0; d < depth_; ++d) value -= u_[d * ld_ + p] * u_[d * ld_ + q];
        tiles_[int64_t{i} * g + j % g] = value;
      }
    }
  }

  void update_tiles() {
    if (!moved_) return;
    const int g = options_.group;
    const T* u = u_ + (depth_ - 1) * ld_;
    for (int i = 0; i < size_; ++i) {
      if (position_[i] < 0) continue;
      const T own = u[position_[i]];
      for (int j = i / g * g; j <= i; ++j) {
        if (position_[j] >= 0) tiles_[int64_t{i} * g + j % g] -= own * u[position_[j]];
      }
    }
  }

  // First index of the group of least joint cost, 1/2 w^T H^-1 w; without square roots, so that
  // equal groups have equal costs. -1 where none is left.
  int cheapest_group(T* best) {
    constexpr int most = kMostGroup;
    const int g = options_.group;
    int chosen = -1;
    *best = INFINITY;
    for (int start = 0; start < size_; start += g) {
      T tile[most][most], weight[most], cost = 0;
      int members = 0;
      for (int i = 0; i < g; ++i) {
        if (position_[start + i] < 0) continue;
        int other = 0;
        for (int j = 0; j <= i; ++j) {
          if (position_[start + j] >= 0)
            tile[members][other++] = tiles_[int64_t{start + i} * g + j];
        }
        weight[members++] = weight_[position_[start + i]];
      }
      for (int i = 0; i < members; ++i) {
        const T variance = tile[i][i];
        cost += variance > 0 ? weight[i] * (weight[i] / (2 * variance)) : static_cast<T>(INFINITY);
        for (int r = i + 1; r < members; ++r) {
          const T factor = tile[r][i] * (1 / variance);
          weight[r] -= factor * weight[i];
          for (int c = i + 1; c <= r; ++c) tile[r][c] -= factor * tile[c][i];
        }
      }
      if (members > 0 && cost < *best) {
        *best = cost;
        chosen = start;
      }
    }
    return chosen;
  }

  // Eliminates the weight at position q; the weights follow if `move`.
  void eliminate(int q, bool move) {
    using V = typename Vec<T>::Type;
    if (depth_ >= (num_left_ > kLargeBlock ? kPanel : kSmallPanel)) subtract();
    const int last = --num_left_;
    T* column = u_ + depth_ * ld_;
    T* row = h_ + q * ld_;
    const T* last_row = h_ + last * ld_;
    T factors[kPanel];
    for (int d = 0; d < depth_; ++d) {
      T* u = u_ + d * ld_;
      factors[d] = u[q];
      u[q] = u[last];
    }
    const T weight = weight_[q], variance = variance_[q];
    position_[index_[q]] = -1;
    std::memcpy(column, row, q * sizeof(T));
    if (q < last) {  // what is last takes the place of what is eliminated
      std::memcpy(row, last_row, q * sizeof(T));
      column[q] = last_row[q];
      row[q] = last_row[last];
      T* at = row + q;
      for (int r = q + 1; r < last; ++r) {
        at += ld_;
        column[r] = *at;
        *at = last_row[r];
      }
      weight_[q] = weight_[last];
      variance_[q] = variance_[last];
      closed_[q] = closed_[last];
      index_[q] = index_[last];
      position_[index_[q]] = q;
    }
    closed_[last] = INFINITY;
    moved_ = variance > 0;  // a weight that nothing compensates moves no other
    if (!moved_) return;
    subtract_rows(column, u_, ld_, factors, depth_, last);
    ++depth_;
    const V scale = 1 / std::sqrt(variance) - V{};
    const V step = (move ? weight / std::sqrt(variance) : T{0}) - V{};
    T* const weights = weight_;
    T* const variances = variance_;
    for (int c = 0; c < last; c += Vec<T>::kLanes) {
      const V u = load(column + c) * scale;
      store(column + c, u);
      store(weights + c, load(weights + c) - u * step);
      store(variances + c, load(variances + c) - u * u);
    }
  }

  void subtract() {
    subtract_panel(h_, ld_, u_, ld_, depth_, num_left_, packed_);
    depth_ = 0;
  }

  const int size_;
  const int64_t ld_;
  const EliminateOptions<T>& options_;
  T* h_;               // [size, ld], the lower half of the inverse before this panel
  T* u_;               // [kPanel, ld], columns eliminated since
  T* packed_;          // for subtract_panel
  T* weight_;          // [ld]
  T* variance_;        // [ld], the diagonal of the inverse of now
  T* closed_;          // [ld], infinite where a weight is not to be eliminated, else 0
  T* costs_;           // [ld]
  T* tiles_;           // [size, group], by index
  int32_t* index_;     // [ld], of the weight at a position
  int32_t* position_;  // [size], by index; -1 where it is eliminated, or is none
  int32_t* open_;      // [size / m], how many of each m may still be eliminated
  int num_left_ = 0;
  int depth_ = 0;
  bool moved_ = false;
};

// One system; `solved` is false where the matrix is not positive definite to rounding.
template <typename T>
bool solve(const T* matrix, int64_t stride, const bool* set, const T* rhs, T* x, int size,
           Workspace workspace) {
  int count = 0;
  int32_t* index = workspace.take<int32_t>(size);
  for (int i = 0; i < size; ++i) {
    x[i] = 0;
    if (set[i]) index[count++] = i;
  }
  const int64_t ld = leading_dimension<T>(count);
  T* h = workspace.take<T>(int64_t{count} * ld);
  T* packed = workspace.take<T>(packed_elements<T>(count));
  T* z = workspace.take<T>(ld);
  for (int r = 0; r < count; ++r) {
    const T* row = matrix + index[r] * stride;
    for (int c = 0; c <= r; ++c) h[r * ld + c] = row[index[c]];
    z[r] = rhs[index[r]];
  }
  // The last row first: row r becomes column r of R, M = R R^T with R upper triangular.
  const int panel = count > kLargeBlock ? kPanel : kSmallPanel;
  for (int r = count - 1, depth = 0; r >= 0; --r) {
    if (depth == panel) {
      subtract_panel(h, ld, h + (r + 1) * ld, ld, depth, r + 1, packed);
      depth = 0;
    }
    T* row = h + r * ld;
    T factors[kPanel];
    for (int d = 0; d < depth; ++d) factors[d] = row[(d + 1) * ld + r];
    subtract_rows(row, row + ld, ld, factors, depth, r + 1);
    if (!(row[r] > 0 && row[r] < static_cast<T>(INFINITY))) return false;
    const T root = std::sqrt(row[r]), scale = 1 / root;
    for (int c = 0; c < r; ++c) row[c] *= scale;
    row[r] = root;
    z[r] *= scale;
    for (int c = 0; c < r; ++c) z[c] -= row[c] * z[r];
    ++depth;
  }
  for (int r = 0; r < count; ++r) {  // R^T x = z
    const T* row = h + r * ld;
    constexpr int lanes = Vec<T>::kLanes;
    typename Vec<T>::Type sums = {};
    int c = 0;
    for (; c + lanes <= r; c += lanes) sums += load(row + c) * load(z + c);
    T sum = 0;
    for (int lane = 0; lane < lanes; ++lane) sum += sums[lane];
    for (; c < r; ++c) sum += row[c] * z[c];
    z[r] = (z[r] - sum) / row[r];
    x[index[r]] = z[r];
  }
  return true;
}

}  // namespace

template <typename T>
int64_t obs_workspace(int size, int group) {
  Workspace workspace(nullptr);
  EliminateOptions<T> options{};
  options.group = group;
  Elimination<T> elimination(workspace, size, options);  // takes more than `solve`
  return workspace.bytes();
}

template <typename T>
void obs_eliminate(const CpuElimination<T>& arrays, const EliminateOptions<T>& options,
                   int64_t begin, int64_t end, void* memory) {
  Workspace workspace(memory);
  const int size = options.size;
  Elimination<T> elimination(workspace, size, options);
  for (int64_t k = begin; k < end; ++k) {
    const CpuMatrices<T>& inverse = arrays.inverse;
    elimination.run(arrays.weight + k * size, inverse.first + k * inverse.block_stride,
                    inverse.row_stride, arrays.alive + k * size, arrays.rank + k * size,
                    arrays.cost + k * size);
  }
}

template <typename T>
void masked_solve(const CpuSystems<T>& systems, int size, int64_t begin, int64_t end,
                  void* memory) {
  for (int64_t k = begin; k < end; ++k) {
    const CpuMatrices<T>& matrix = systems.matrix;
    systems.solved[k] =
        solve(matrix.first + k * matrix.block_stride, matrix.row_stride, systems.set + k * size,
              systems.rhs + k * size, systems.x + k * size, size, Workspace(memory));
  }
}

#define FISHLEG_EXT_INSTANTIATE(T)                                                              \
  template int64_t obs_workspace<T>(int, int);                                                  \
  template void obs_eliminate<T>(const CpuElimination<T>&, const EliminateOptions<T>&, int64_t, \
                                 int64_t, void*);                                               \
  template void masked_solve<T>(const CpuSystems<T>&, int, int64_t, int64_t, void*);
FISHLEG_EXT_INSTANTIATE(float)
FISHLEG_EXT_INSTANTIATE(double)

}  // namespace FISHLEG_EXT_INSTRUCTION_SET
}  // namespace fishleg_ext
