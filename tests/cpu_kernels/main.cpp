// Runs the CPU kernels of one instruction set on many small cases, for the sanitizers to watch, and
// compares them with elimination as it is defined, in long double. Prints what differs.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cpu_block_fisher.h"
#include "cpu_obs.h"

namespace isa = fishleg_ext::FISHLEG_EXT_INSTRUCTION_SET;

namespace {

using Wide = long double;
int failures = 0;
std::mt19937 generator(0);

double normal() { return std::normal_distribution<double>()(generator); }

struct Block {
  int size;
  std::vector<double> weight, inverse;
  std::vector<char> alive;
};

Block random_block(int size, double dead_share) {
  Block block{size, {}, std::vector<double>(static_cast<size_t>(size) * size), {}};
  std::vector<double> factor(static_cast<size_t>(size) * size);
  for (double& x : factor) x = normal();
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) {
      double sum = i == j ? size * 0.1 : 0.0;
      for (int k = 0; k < size; ++k) sum += factor[i * size + k] * factor[j * size + k];
      block.inverse[i * size + j] = sum;
    }
    block.weight.push_back(normal());
    block.alive.push_back(std::uniform_real_distribution<double>()(generator) >= dead_share);
  }
  return block;
}

void eliminate(std::vector<Wide>& h, std::vector<Wide>& w, int size, int q, bool move) {
  const Wide variance = h[q * size + q];
  if (move) {
    const Wide factor = w[q] / variance;
    for (int i = 0; i < size; ++i) w[i] -= h[i * size + q] * factor;
  }
  std::vector<Wide> column(size);
  for (int i = 0; i < size; ++i) column[i] = h[i * size + q];
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) h[i * size + j] -= column[i] * column[j] / variance;
  }
}

void expect(bool holds, const char* what, int size, int group, int m) {
  if (holds) return;
  ++failures;
  std::printf("%s: size %d, group %d, m %d\n", what, size, group, m);
}

// Costs along the order that came back are those of the definition, and no other weight was
// cheaper.
template <typename T>
void check_elimination(int size, int group, int n, int m, bool dead_first, double dead_share) {
  const Block block = random_block(size, dead_share);
  std::vector<T> weight(block.weight.begin(), block.weight.end());
  std::vector<T> inverse(block.inverse.begin(), block.inverse.end());
  std::unique_ptr<bool[]> alive(new bool[size]);
  for (int i = 0; i < size; ++i) alive[i] = block.alive[i];
  std::vector<int32_t> rank(size);
  std::vector<T> cost(size);
  const fishleg_ext::EliminateOptions<T> options{
      1, size, 0, group, n, m, static_cast<T>(INFINITY), dead_first};
  const fishleg_ext::CpuElimination<T> arrays{
      weight.data(), {inverse.data(), 0, size}, alive.get(), rank.data(), cost.data()};
  void* workspace = std::aligned_alloc(64, isa::obs_workspace<T>(size, group));
  isa::obs_eliminate<T>(arrays, options, 0, 1, workspace);
  std::free(workspace);

  std::vector<Wide> h(inverse.begin(), inverse.end()), w(weight.begin(), weight.end());
  std::vector<int> order(size, -1);
  int reached = 0;
  for (int i = 0; i < size; ++i) {
    expect((rank[i] == -1) == !alive[i], "rank of the dead", size, group, m);
    if (rank[i] >= 0 && rank[i] < size) {
      order[rank[i]] = i;
      ++reached;
    }
    if (alive[i]) continue;
    w[i] = 0;
    if (dead_first) {
      eliminate(h, w, size, i, false);
    } else {
      for (int j = 0; j < size; ++j) h[i * size + j] = h[j * size + i] = i == j;
    }
  }
  const Wide tolerance = sizeof(T) == 4 ? 2e-4L : 1e-11L;
  Wide joint = 0;
  for (int step = 0; step < reached; ++step) {
    const int q = order[step];
    expect(q >= 0, "ranks are consecutive", size, group, m);
    if (q < 0) return;
    joint += w[q] * w[q] / (2 * h[q * size + q]);
    if (group == 1) {
      const Wide own = w[q] * w[q] / (2 * h[q * size + q]);
      expect(std::fabs(own - cost[q]) <= tolerance * (1 + own), "cost", size, group, m);
      for (int later = step + 1; m == 0 && later < reached; ++later) {
        const int other = order[later];
        const Wide dearer = w[other] * w[other] / (2 * h[other * size + other]);
        expect(dearer >= own - tolerance * (1 + own), "order", size, group, m);
      }
    }
    eliminate(h, w, size, q, true);
  }
  Wide sum = 0;
  for (int i = 0; i < size; ++i) sum += rank[i] >= 0 && rank[i] < size ? Wide{cost[i]} : 0;
  expect(std::fabs(sum - joint) <= tolerance * (1 + joint), "joint cost", size, group, m);
  for (int start = 0; m > 0 && start < size; start += m) {
    int kept = 0;
    for (int i = start; i < start + m; ++i) kept += alive[i] && rank[i] == size;
    int alive_here = 0;
    for (int i = start; i < start + m; ++i) alive_here += alive[i];
    expect(kept == (alive_here < n ? alive_here : n), "n of m", size, group, m);
  }
}

template <typename T>
void check_solve(int size, double share) {
  const Block block = random_block(size, 1 - share);
  std::vector<T> rhs(block.weight.begin(), block.weight.end()), x(size, static_cast<T>(NAN));
  std::vector<T> matrix(block.inverse.begin(), block.inverse.end());
  std::unique_ptr<bool[]> set(new bool[size]);
  for (int i = 0; i < size; ++i) set[i] = block.alive[i];
  bool solved = false;
  const fishleg_ext::CpuSystems<T> systems{
      {matrix.data(), 0, size}, set.get(), rhs.data(), x.data(), &solved};
  void* workspace = std::aligned_alloc(64, isa::obs_workspace<T>(size, 1));
  isa::masked_solve<T>(systems, size, 0, 1, workspace);
  expect(solved, "solved", size, 1, 0);
  const Wide tolerance = sizeof(T) == 4 ? 1e-3L : 1e-10L;
  for (int i = 0; i < size; ++i) {
    Wide residual = set[i] ? -Wide{rhs[i]} : Wide{x[i]}, scale = 1;
    for (int j = 0; set[i] && j < size; ++j) {
      residual += Wide{matrix[i * size + j]} * x[j];
      scale += std::fabs(Wide{matrix[i * size + j]} * x[j]);
    }
    expect(std::fabs(residual) <= tolerance * scale, "residual", size, 1, 0);
  }
  for (int i = 0; i < size; ++i) {
    if (set[i]) matrix[i * size + i] = -1;
  }
  bool any = false;
  for (int i = 0; i < size; ++i) any = any || set[i];
  isa::masked_solve<T>(systems, size, 0, 1, workspace);
  expect(solved == !any, "what is not positive definite is not solved", size, 1, 0);
  std::free(workspace);
}

// Each part of the rows by itself, as threads do it; gradients by rows or by columns.
template <typename T>
void check_gram(int size, int count, int parts, bool by_columns) {
  std::vector<T> gradients(static_cast<size_t>(count) * size), gram(size * size);
  for (T& x : gradients) x = static_cast<T>(normal());
  const int64_t row_stride = by_columns ? 1 : size, column_stride = by_columns ? count : 1;
  for (int i = 0; i < size * size; ++i) gram[i] = static_cast<T>(i / size + i % size);
  const T alpha = static_cast<T>(0.5);
  const fishleg_ext::CpuGram<T> arrays{
      gram.data(), gradients.data(), count, {row_stride, 0, column_stride}, size, alpha};
  void* workspace = std::aligned_alloc(64, (isa::gram_workspace<T>(size) + 63) / 64 * 64);
  for (int part = parts - 1; part >= 0; --part) {
    isa::add_gram<T>(arrays, 0, size * part / parts, size * (part + 1) / parts, workspace);
  }
  std::free(workspace);
  const Wide tolerance = sizeof(T) == 4 ? 1e-5L : 1e-14L;
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) {
      Wide sum = 0, scale = 0;
      for (int s = 0; s < count; ++s) {
        const Wide product = Wide{gradients[s * row_stride + i * column_stride]} *
                             gradients[s * row_stride + j * column_stride];
        sum += product;
        scale += std::fabs(product);
      }
      const Wide expected = i + j + alpha * sum;
      expect(std::fabs(gram[i * size + j] - expected) <= tolerance * (i + j + 1 + scale),
             "Gram matrix", size, parts, count);
      expect(gram[i * size + j] == gram[j * size + i], "symmetric Gram matrix", size, parts, count);
    }
  }
}

// Times the matrix the inverse is the identity; what has none is told, and left as it was.
template <typename T>
void check_inverse(int size) {
  const Block block = random_block(size, 0);
  std::vector<T> matrix(block.inverse.begin(), block.inverse.end()), inverse(matrix.size());
  bool inverted = false;
  const T damping = static_cast<T>(0.25);
  const auto invert = [&](T added) {
    for (T& x : inverse) x = static_cast<T>(NAN);
    const fishleg_ext::CpuInversion<T> arrays{matrix.data(), inverse.data(), &inverted, size,
                                              added};
    void* workspace = std::aligned_alloc(64, (isa::inverse_workspace<T>(size) + 63) / 64 * 64);
    isa::block_inverse<T>(arrays, 0, 1, workspace);
    std::free(workspace);
  };
  invert(damping);
  expect(inverted, "inverted", size, 1, 0);
  const Wide tolerance = sizeof(T) == 4 ? 2e-4L : 1e-12L;
  for (int i = 0; i < size; i += 1 + size / 200) {
    for (int j = 0; j < size; ++j) {
      Wide sum = Wide{damping} * inverse[i * size + j], scale = 1;
      for (int k = 0; k < size; ++k) {
        const Wide product = Wide{matrix[i * size + k]} * inverse[k * size + j];
        sum += product;
        scale += std::fabs(product);
      }
      expect(std::fabs(sum - (i == j)) <= tolerance * scale, "inverse", size, 1, 0);
      expect(inverse[i * size + j] == inverse[j * size + i], "symmetric inverse", size, 1, 0);
    }
  }
  for (int row : {0, size / 2, size - 1}) {  // NaN anywhere, inf, and a negative pivot
    for (int column : {0, row, size - 1}) {
      for (T wrong : {static_cast<T>(NAN), static_cast<T>(INFINITY), static_cast<T>(-1e4)}) {
        if (wrong < 0 && row != column) continue;
        const T right = matrix[row * size + column];
        matrix[row * size + column] = wrong;
        invert(damping);
        expect(!inverted, "what has no inverse", size, row, column);
        expect(std::isnan(inverse[0]), "is left", size, row, column);
        matrix[row * size + column] = right;
      }
    }
  }
}

template <typename T>
void check_all() {
  for (int size : {1, 2, 3, 5, 6, 7, 8, 12, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 97, 130}) {
    for (double dead : {0.0, 0.4}) {
      check_elimination<T>(size, 1, 0, 0, false, dead);
      check_elimination<T>(size, 1, 0, 0, true, dead);
    }
    for (double share : {0.0, 0.3, 1.0}) check_solve<T>(size, share);
    check_inverse<T>(size);
    for (int count : {0, 1, 7, 130}) {
      for (int parts : {1, 3}) check_gram<T>(size, count, parts, count == 7);
    }
  }
  for (int size : {4, 8, 36, 64, 132}) {
    for (double dead : {0.0, 0.4}) {
      check_elimination<T>(size, 4, 0, 0, dead > 0, dead);
      check_elimination<T>(size, 1, 2, 4, dead > 0, dead);
    }
  }
}

}  // namespace

int main() {
  check_all<float>();
  check_all<double>();
  check_solve<float>(800, 1.0);  // wide panels
  check_inverse<float>(800);
  if (failures == 0) std::printf("all passed\n");
  return failures != 0;
}
