// The topk mixture on the CPU: shrink -> mix -> expand over blocks of tokens, and its backward.
// Grouped: within a block, (token, slot) pairs are sorted by expert and each expert's rows meet
// only its tokens. Stacked: every expert is computed, weights of the unselected are exact zeros.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/expand.h"
#include "cpu/kernels.h"
#include "cpu/outer.h"
#include "cpu/shrink.h"
#include "mix/topk.h"

namespace moelora {
namespace MOELORA_LEVEL {

// The (token, slot) pairs of a block, sorted by expert; pairs of an expert keep their order.
class Groups {
 public:
  void sort(const int32_t* selected, int64_t t0, int64_t t1, int k, int E) {
    offsets_.assign(E + 1, 0);
    order_.resize((t1 - t0) * k);
    for (int64_t q = t0 * k; q < t1 * k; ++q) ++offsets_[selected[q] + 1];
    for (int e = 0; e < E; ++e) offsets_[e + 1] += offsets_[e];
    next_.assign(offsets_.begin(), offsets_.end());
    for (int64_t q = t0 * k; q < t1 * k; ++q) order_[next_[selected[q]]++] = q;
  }
  int64_t size(int e) const { return offsets_[e + 1] - offsets_[e]; }
  const int64_t* pairs(int e) const { return order_.data() + offsets_[e]; }

 private:
  std::vector<int64_t> order_, offsets_, next_;
};

template <class T>
class TopkKernels {
  using A = acc_t<T>;
  using P = typename PanelOf<T>::type;
  using word = typename P::word;

  static const T* in(const void* p) { return static_cast<const T*>(p); }
  static A* acc(void* p) { return static_cast<A*>(p); }
  static const A* acc(const void* p) { return static_cast<const A*>(p); }

  // Tokens per pass of expand: long enough that filling the panel is lost in the noise, short
  // enough that their coefficients stay in L2.
  static constexpr int64_t kExpandTokens = 512;

  // Coefficients per (token, slot) in dhidden: the expert's rows, and the router's row if its
  // gradient is sparse.
  static int per_slot(const TopkBackward& p) { return p.r + (p.dense_router() ? 0 : 1); }

  // ---------------------------------------------------------------- shrink against the experts'
  // rows

  // out[t, slot or expert, j] = <dropout(v_t), rows of the expert> for tokens [t0, t1).
  //   v       [T, C], ldv
  //   rows    [E, r, C]
  //   dropout null if v is seen as it is
  //   out     [T, rows() * r]
  static void shrink_experts(const Topk& p, int64_t t0, int64_t t1, const T* v, int64_t ldv,
                             const T* rows, int64_t C, const Dropout* dropout, A* out) {
    static thread_local Scratch<T> masked_scratch;
    static thread_local Scratch<A> result_scratch;
    static thread_local std::vector<const T*> block, gathered;
    static thread_local Groups groups;
    const int64_t n = t1 - t0, ldo = static_cast<int64_t>(p.rows()) * p.r;
    const bool per_expert = dropout && p.dropout_per_expert;

    block.resize(n);
    for (int64_t i = 0; i < n; ++i) block[i] = v + (t0 + i) * ldv;
    T* masked = dropout ? masked_scratch.take(n * C) : nullptr;
    if (dropout && !per_expert)
      for (int64_t i = 0; i < n; ++i) {
        masked_copy(*dropout, block[i], t0 + i, 0, 0, C, masked + i * C);
        block[i] = masked + i * C;
      }

    if (p.stacked && !per_expert) {
      shrink<T>(n, block.data(), rows, C, ldo, C, out + t0 * ldo, ldo);
    } else if (p.stacked) {
      gathered.resize(n);
      for (int e = 0; e < p.E; ++e) {
        for (int64_t i = 0; i < n; ++i) {
          gathered[i] = masked + i * C;
          masked_copy(*dropout, block[i], t0 + i, e, 0, C, masked + i * C);
        }
        shrink<T>(n, gathered.data(), rows + e * p.r * C, C, p.r, C, out + t0 * ldo + e * p.r, ldo);
      }
    } else {
      groups.sort(p.selected, t0, t1, p.k, p.E);
      A* result = result_scratch.take(n * p.r);
      gathered.resize(n);
      for (int e = 0; e < p.E; ++e) {
        const int64_t size = groups.size(e);
        const int64_t* pairs = groups.pairs(e);
        for (int64_t i = 0; i < size; ++i) {
          const int64_t t = pairs[i] / p.k;
          gathered[i] = block[t - t0];
          if (per_expert) {
            masked_copy(*dropout, block[t - t0], t, e, 0, C, masked + i * C);
            gathered[i] = masked + i * C;
          }
        }
        shrink<T>(size, gathered.data(), rows + e * p.r * C, C, p.r, C, result, p.r);
        for (int64_t i = 0; i < size; ++i)
          memcpy(out + pairs[i] * p.r, result + i * p.r, p.r * sizeof(A));
      }
    }
    if (dropout) {
      const A inv_keep = static_cast<A>(dropout->inv_keep);
      for (int64_t i = t0 * ldo; i < t1 * ldo; ++i) out[i] *= inv_keep;
    }
  }

  // ---------------------------------------------------------------- expand of the experts' rows

  // Which experts a token range touches and their rows as a panel table: per expert r rows of
  // `rows`, then its row of `extra` if given, padded to whole entries.
  struct Experts {
    std::vector<const T*> rows;
    std::vector<int32_t> position;  // of expert e in the table, in units of `entries`; -1 if absent
    int entries = 0;                // per expert
  };

  template <class Panel>
  static void gather_experts(const Topk& p, int64_t t0, int64_t t1, const T* rows, int64_t C,
                             const T* extra, Experts& out) {
    const int count = p.r + (extra ? 1 : 0);
    out.entries = (count + Panel::kRowsPerEntry - 1) / Panel::kRowsPerEntry;
    out.rows.clear();
    out.position.assign(p.E, -1);
    if (p.stacked)
      std::fill(out.position.begin(), out.position.end(), 0);
    else
      for (int64_t q = t0 * p.k; q < t1 * p.k; ++q) out.position[p.selected[q]] = 0;
    int32_t next = 0;
    for (int e = 0; e < p.E; ++e) {
      if (out.position[e] < 0) continue;
      out.position[e] = next++;
      for (int j = 0; j < p.r; ++j)
        out.rows.push_back(rows + (static_cast<int64_t>(e) * p.r + j) * C);
      if (extra) out.rows.push_back(extra + e * C);
      while (out.rows.size() % Panel::kRowsPerEntry) out.rows.push_back(nullptr);
    }
  }

  // out[t] (+)= Σ_slots Σ_j h[t, slot, j] row_j of the slot's expert, for tokens [t0, t1), at most
  // kExpandTokens.
  //   h      [t1 - t0, rows() * per_slot], per_slot = r (+ 1 with `extra`)
  //   extra  [E, C] or null: one more row per expert
  //   masked the result passes the dropout mask before it is added
  static void expand_experts(const Topk& p, int64_t t0, int64_t t1, int64_t c0, int64_t c1,
                             const T* rows, int64_t C, const T* extra, const A* h, bool masked,
                             const Output<T>& out) {
    static thread_local Experts experts;
    static thread_local std::vector<int32_t> entry;
    static thread_local std::vector<word> words;
    if (masked) return expand_masked_experts(p, t0, t1, c0, c1, rows, C, h, out);
    const int per_slot = p.r + (extra ? 1 : 0), slots = p.rows();
    gather_experts<P>(p, t0, t1, rows, C, extra, experts);
    const int per_token = slots * experts.entries;
    words.resize((t1 - t0) * per_token);
    if (!p.stacked) entry.resize((t1 - t0) * per_token);
    for (int64_t t = t0; t < t1; ++t)
      for (int s = 0; s < slots; ++s) {
        const int64_t q = (t - t0) * per_token + s * experts.entries;
        P::pack(h + ((t - t0) * slots + s) * per_slot, per_slot, words.data() + q);
        if (p.stacked) continue;
        const int32_t first = experts.position[p.selected[t * p.k + s]] * experts.entries;
        for (int i = 0; i < experts.entries; ++i) entry[q + i] = first + i;
      }
    const RowTable<T> table = {experts.rows.data(),
                               static_cast<int64_t>(experts.rows.size()) / P::kRowsPerEntry};
    if (p.stacked)
      expand_dense<T>(table, t0, t1, c0, c1, words.data(), out);
    else
      expand_sparse<T>(table, t0, t1, c0, c1, per_token, entry.data(), words.data(), out);
  }

  // The same under dropout: each slot's rows, or all of a token's, times a mask.
  static void expand_masked_experts(const Topk& p, int64_t t0, int64_t t1, int64_t c0, int64_t c1,
                                    const T* rows, int64_t C, const A* h, const Output<T>& out) {
    static thread_local Experts experts;
    static thread_local std::vector<int32_t> entry, mask_expert;
    gather_experts<WidePanel<T>>(p, t0, t1, rows, C, nullptr, experts);
    const int slots = p.rows();
    const int segments = p.dropout_per_expert ? slots : 1;
    entry.resize((t1 - t0) * slots * p.r);
    mask_expert.assign((t1 - t0) * segments, 0);
    for (int64_t t = t0; t < t1; ++t)
      for (int s = 0; s < slots; ++s) {
        const int e = p.stacked ? s : p.selected[t * p.k + s];
        for (int j = 0; j < p.r; ++j)
          entry[((t - t0) * slots + s) * p.r + j] = experts.position[e] * p.r + j;
        if (p.dropout_per_expert) mask_expert[(t - t0) * segments + s] = e;
      }
    const RowTable<T> table = {experts.rows.data(), static_cast<int64_t>(experts.rows.size())};
    expand_masked<T>(table, t0, t1, c0, c1, segments, slots * p.r / segments, entry.data(), h,
                     *p.dropout, mask_expert.data(), out);
  }

  // out[t] += Σ_e h[t - t0, e] row_e over all E rows (the router, when every expert has a
  // gradient).
  static void expand_rows(int64_t t0, int64_t t1, int E, const T* rows, int64_t C, const A* h,
                          const Output<T>& out) {
    static thread_local std::vector<const T*> table;
    static thread_local std::vector<word> words;
    table.clear();
    for (int e = 0; e < E; ++e) table.push_back(rows + e * C);
    while (table.size() % P::kRowsPerEntry) table.push_back(nullptr);
    const int64_t entries = static_cast<int64_t>(table.size()) / P::kRowsPerEntry;
    words.resize((t1 - t0) * entries);
    for (int64_t t = t0; t < t1; ++t)
      P::pack(h + (t - t0) * E, E, words.data() + (t - t0) * entries);
    expand_dense<T>({table.data(), entries}, t0, t1, 0, C, words.data(), out);
  }

  // ---------------------------------------------------------------- the mix of one token

  // out = scale w H, [rows() * r]; exact zeros for the unselected of the stacked layout, whatever
  // their hidden.
  static void gate_hidden(const Topk& p, int64_t t, A* out) {
    const A scale = static_cast<A>(p.scale);
    const A* hidden = acc(p.hidden) + t * p.rows() * p.r;
    if (p.stacked) std::fill(out, out + static_cast<int64_t>(p.E) * p.r, A(0));
    for (int s = 0; s < p.k; ++s) {
      const int64_t slot = p.stacked ? p.selected[t * p.k + s] : s;
      const A gate = scale * acc(p.weights)[t * p.k + s];
      for (int j = 0; j < p.r; ++j) out[slot * p.r + j] = gate * hidden[slot * p.r + j];
    }
  }

  // From dH' of one token to what the expands and outer products take: dhidden, hidden_out and
  // dlogits.
  static void mix_backward(const TopkBackward& p, int64_t t, const A* dhidden_out) {
    static thread_local std::vector<A> scratch;
    scratch.resize(2 * p.k + 2 * p.E);
    A *dweights = scratch.data(), *rest = dweights + p.k;
    const A scale = static_cast<A>(p.scale);
    // Both uses of dhidden pass the mask, which therefore carries no 1 / (1 - p) of its own.
    const A outgoing = p.dropout ? scale * static_cast<A>(p.dropout->inv_keep) : scale;
    const bool dense_router = p.dense_router();
    const int width = per_slot(p);
    const int32_t* selected = p.selected + t * p.k;
    const A* weights = acc(p.weights) + t * p.k;
    const A* hidden = acc(p.hidden) + t * p.rows() * p.r;
    A* dhidden = acc(p.dhidden) + t * p.rows() * width;

    if (p.hidden_out) gate_hidden(p, t, acc(p.hidden_out) + t * p.rows() * p.r);
    if (p.stacked) std::fill(dhidden, dhidden + static_cast<int64_t>(p.E) * width, A(0));
    for (int s = 0; s < p.k; ++s) {
      const int64_t slot = p.stacked ? selected[s] : s;
      dweights[s] = dweight_row(dhidden_out + slot * p.r, hidden + slot * p.r, p.r, scale);
      for (int j = 0; j < p.r; ++j)
        dhidden[slot * width + j] = outgoing * weights[s] * dhidden_out[slot * p.r + j];
    }
    if (!dense_router) {
      topk_backward_selected(weights, dweights, p.k, rest);
      for (int s = 0; s < p.k; ++s) dhidden[s * width + p.r] = rest[s];
      return;
    }
    topk_backward_row(acc(p.logits) + t * p.E, weights, selected, dweights, acc(p.dprob_sums), p.E,
                      p.k, p.renormalize, rest, acc(p.dlogits) + t * p.E);
  }

  // ---------------------------------------------------------------- outer products with token rows

  // sums[e * per_slot + j, c] += Σ_t h[t, slot of e, j] v[t, c] over the tokens that chose e.
  //   masked  v is seen under the dropout mask, as 0 or v
  static void outer_experts(const Topk& p, const T* v, int64_t ldv, const A* h, int per_slot,
                            bool masked, int64_t c0, int64_t c1, A* sums, int64_t lds) {
    static thread_local Groups groups;
    static thread_local std::vector<const T*> rows;
    static thread_local std::vector<const A*> coefficients;
    static thread_local Scratch<T> masked_scratch;
    const int64_t block = outer_block(per_slot), slots = p.rows(), width = c1 - c0;
    for (int64_t t0 = 0; t0 < p.T; t0 += block) {
      const int64_t t1 = std::min(p.T, t0 + block);
      if (!p.stacked) groups.sort(p.selected, t0, t1, p.k, p.E);
      T* copy = masked ? masked_scratch.take((t1 - t0 + 1) * width) : nullptr;
      if (masked && !p.dropout_per_expert)
        for (int64_t t = t0; t < t1; ++t)
          masked_copy(*p.dropout, v + t * ldv, t, 0, c0, c1, copy + (t - t0) * width);
      for (int e = 0; e < p.E; ++e) {
        const int64_t n = p.stacked ? t1 - t0 : groups.size(e);
        if (!n) continue;
        rows.resize(n + 1);
        coefficients.resize(n);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t q = p.stacked ? (t0 + i) * slots + e : groups.pairs(e)[i];
          const int64_t t = q / slots;
          coefficients[i] = h + q * per_slot;
          if (!masked) {
            rows[i] = v + t * ldv + c0;
          } else if (!p.dropout_per_expert) {
            rows[i] = copy + (t - t0) * width;
          } else {
            masked_copy(*p.dropout, v + t * ldv, t, e, c0, c1, copy + i * width);
            rows[i] = copy + i * width;
          }
        }
        outer<T>(n, rows.data(), coefficients.data(), per_slot, 0, width,
                 sums + static_cast<int64_t>(e) * per_slot * lds, lds);
      }
    }
  }

  // sums[e, c] += Σ_t h[t, e] v[t, c].
  static void outer_rows(const Topk& p, const T* v, int64_t ldv, const A* h, int64_t c0, int64_t c1,
                         A* sums, int64_t lds) {
    static thread_local std::vector<const T*> rows;
    static thread_local std::vector<const A*> coefficients;
    const int64_t block = outer_block(p.E);
    for (int64_t t0 = 0; t0 < p.T; t0 += block) {
      const int64_t n = std::min(p.T, t0 + block) - t0;
      rows.resize(n + 1);
      coefficients.resize(n);
      for (int64_t i = 0; i < n; ++i) {
        rows[i] = v + (t0 + i) * ldv;
        coefficients[i] = h + (t0 + i) * p.E;
      }
      outer<T>(n, rows.data(), coefficients.data(), p.E, c0, c1, sums, lds);
    }
  }

 public:
  // ---------------------------------------------------------------- forward

  static void tokens(const TopkForward& p, int64_t begin, int64_t end) {
    static thread_local std::vector<const T*> rows;
    for (int64_t t0 = begin; t0 < end; t0 += kTokenBlock) {
      const int64_t t1 = std::min(end, t0 + kTokenBlock);
      rows.resize(t1 - t0);
      for (int64_t t = t0; t < t1; ++t) rows[t - t0] = in(p.x) + t * p.ldx;
      shrink<T>(t1 - t0, rows.data(), in(p.router), p.K, p.E, p.K, acc(p.logits) + t0 * p.E, p.E);
      route(p, t0, t1);
      shrink_experts(p, t0, t1, in(p.x), p.ldx, in(p.lora_down), p.K, p.dropout, acc(p.hidden));
    }
  }

  static void route(const TopkForward& p, int64_t t0, int64_t t1) {
    static thread_local std::vector<A> probs;
    probs.resize(p.E);
    for (int64_t t = t0; t < t1; ++t) {
      topk_forward_row(acc(p.logits) + t * p.E, p.E, p.k, p.renormalize, p.selected + t * p.k,
                       acc(p.weights) + t * p.k, probs.data());
      A* sums = acc(p.prob_partials) + t / kTokenUnit * p.E;
      for (int e = 0; e < p.E; ++e) sums[e] = (t % kTokenUnit ? sums[e] : A(0)) + probs[e];
    }
  }

  static void expand(const TopkForward& p, int64_t begin, int64_t end, int64_t c0, int64_t c1) {
    static thread_local Scratch<A> scratch;
    const Output<T> out = {static_cast<T*>(p.y), p.ldy, in(p.bias), p.accumulate};
    const int64_t width = static_cast<int64_t>(p.rows()) * p.r;
    A* h = scratch.take(kExpandTokens * width);
    for (int64_t t0 = begin; t0 < end; t0 += kExpandTokens) {
      const int64_t t1 = std::min(end, t0 + kExpandTokens);
      for (int64_t t = t0; t < t1; ++t) gate_hidden(p, t, h + (t - t0) * width);
      expand_experts(p, t0, t1, c0, c1, in(p.lora_up), p.N, nullptr, h, false, out);
    }
  }

  static void logits(const TopkForward& p, int64_t e0, int64_t e1) {
    std::vector<const T*> rows(p.T);
    for (int64_t t = 0; t < p.T; ++t) rows[t] = in(p.x) + t * p.ldx;
    shrink<T>(p.T, rows.data(), in(p.router) + e0 * p.K, p.K, e1 - e0, p.K, acc(p.logits) + e0,
              p.E);
  }

  static void hidden(const TopkForward& p, int64_t u0, int64_t u1) {
    const int64_t per_expert = (p.r + kHiddenUnitRows - 1) / kHiddenUnitRows;
    std::vector<const T*> rows(p.T);
    for (int64_t t = 0; t < p.T; ++t) rows[t] = in(p.x) + t * p.ldx;
    for (int64_t u = u0; u < u1; ++u) {
      const int64_t q = u / per_expert, j = u % per_expert * kHiddenUnitRows;
      const int count = static_cast<int>(std::min<int64_t>(kHiddenUnitRows, p.r - j));
      const int64_t e = p.stacked ? q : p.selected[q];
      const T* w = in(p.lora_down) + (e * p.r + j) * p.K;
      A* out = acc(p.hidden) + q * p.r + j;
      if (p.stacked)
        shrink<T>(p.T, rows.data(), w, p.K, count, p.K, out, static_cast<int64_t>(p.E) * p.r);
      else
        shrink<T>(1, rows.data() + q / p.k, w, p.K, count, p.K, out, p.r);
    }
  }

  // ---------------------------------------------------------------- backward

  static void backward_tokens(const TopkBackward& p, int64_t begin, int64_t end) {
    static thread_local Scratch<A> scratch;
    const int64_t width = static_cast<int64_t>(p.rows()) * p.r;
    for (int64_t t0 = begin; t0 < end; t0 += kTokenBlock) {
      const int64_t t1 = std::min(end, t0 + kTokenBlock);
      A* dhidden_out = scratch.take((t1 - t0) * width) - t0 * width;
      shrink_experts(p, t0, t1, in(p.dy), p.lddy, in(p.lora_up), p.N, nullptr, dhidden_out);
      for (int64_t t = t0; t < t1; ++t) mix_backward(p, t, dhidden_out + t * width);
    }
    if (!p.dx) return;
    const bool dense_router = p.dense_router();
    const Output<T> out = {static_cast<T*>(p.dx), p.lddx, nullptr, p.accumulate};
    const Output<T> onto = {static_cast<T*>(p.dx), p.lddx, nullptr, true};
    const int64_t per_token = p.rows() * per_slot(p);
    for (int64_t t0 = begin; t0 < end; t0 += kExpandTokens) {
      const int64_t t1 = std::min(end, t0 + kExpandTokens);
      expand_experts(p, t0, t1, 0, p.K, in(p.lora_down), p.K, dense_router ? nullptr : in(p.router),
                     acc(p.dhidden) + t0 * per_token, p.dropout != nullptr, out);
      if (dense_router)
        expand_rows(t0, t1, p.E, in(p.router), p.K, acc(p.dlogits) + t0 * p.E, onto);
    }
  }

  static void backward_down(const TopkBackward& p, int64_t c0, int64_t c1) {
    const bool dense_router = p.dense_router(), masked = p.dropout != nullptr;
    std::vector<T*> destination;
    for (int64_t e = 0; e < p.E; ++e) {
      for (int64_t j = 0; j < p.r; ++j)
        destination.push_back(static_cast<T*>(p.dlora_down) + (e * p.r + j) * p.K);
      if (!dense_router) destination.push_back(static_cast<T*>(p.drouter) + e * p.K);
    }
    accumulate_rows<T>(
        static_cast<int64_t>(destination.size()), c0, c1,
        [&](int64_t a, int64_t b, A* sums, int64_t width) {
          outer_experts(p, in(p.x), p.ldx, acc(p.dhidden), per_slot(p), masked, a, b, sums, width);
        },
        destination.data());
    if (!dense_router) return;
    destination.clear();
    for (int64_t e = 0; e < p.E; ++e) destination.push_back(static_cast<T*>(p.drouter) + e * p.K);
    accumulate_rows<T>(
        p.E, c0, c1,
        [&](int64_t a, int64_t b, A* sums, int64_t width) {
          outer_rows(p, in(p.x), p.ldx, acc(p.dlogits), a, b, sums, width);
        },
        destination.data());
  }

  static void backward_up(const TopkBackward& p, int64_t c0, int64_t c1) {
    std::vector<T*> destination;
    for (int64_t i = 0; i < static_cast<int64_t>(p.E) * p.r; ++i)
      destination.push_back(static_cast<T*>(p.dlora_up) + i * p.N);
    accumulate_rows<T>(
        static_cast<int64_t>(destination.size()), c0, c1,
        [&](int64_t a, int64_t b, A* sums, int64_t width) {
          outer_experts(p, in(p.dy), p.lddy, acc(p.hidden_out), p.r, false, a, b, sums, width);
        },
        destination.data());
  }
};

}  // namespace MOELORA_LEVEL
}  // namespace moelora
