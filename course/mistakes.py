"""Wrong implementations, each one line away from the right one, and the test that must catch it.

They keep the suite honest: a test that lets its mistake pass is no test. They are also what learners get wrong most
often, so `why` is written for them. `course/mutants.py` makes the mistakes and runs the tests.
"""

from typing import NamedTuple


class Mistake(NamedTuple):
    """A change of one place in the reference that makes it wrong."""

    name: str
    file: str
    right: str  # occurs exactly once in the file
    wrong: str
    caught_by: str  # the test that must fail, by assertion
    why: str


STEP = "test_stage1_online_softmax.py::test_step_equals_merge_with_a_block"
TILED = "test_stage1_tiled_forward.py::"
SUMS = "test_stage1_scores_and_sums.py::"
FORWARD = "test_stage2_forward.py::"
FEATURES = "test_stage2_features.py::"
SCORES = "test_stage3_scores.py::"
ROW_SUM = "test_stage3_row_sum.py::"
COL_SUM = "test_stage3_col_sum.py::"
LINEAR_SUMS = "test_stage3_linear_sums.py::"
SOFTMAX_SUMS = "test_stage3_softmax_sums.py::"
STATS = "test_stage3_stats.py::"
REDUCTION = "test_stage3_reduction.py::"
RECOMPUTED = "test_stage4_recompute.py::"
AUTOGRAD = "test_stage4_autograd.py::"
DELTA = "test_stage4_delta.py::"
KERNELS = "test_stage4_kernels.py::"
GRAD_KV = "test_stage4_grad_kv.py::"
LINEAR_GRADS = "test_stage4_linear_grads.py::"
EVICTION = "test_stage5_eviction.py::"
SOFTMAX = "stage1_pytorch_tiled/online_softmax.py"
LOOP = "stage1_pytorch_tiled/tiled_forward.py"
HOOKS = "stage1_pytorch_tiled/hooks.py"
SIMPLE = "stage2_triton_forward/simple_kernel.py"
TILES = "stage2_triton_forward/tiles.py"
KERNEL = "stage2_triton_forward/forward_kernel.py"
LOOP_HOOKS = "stage3_scores_and_sums/hooks.py"
LAUNCH = "stage3_scores_and_sums/launch.py"
COLUMNS = "stage3_scores_and_sums/column_sum_kernel.py"
LINEAR = "stage3_scores_and_sums/linear_sum_kernel.py"
RECOMPUTE = "stage4_backward/recompute_pytorch.py"
BACKWARD = "stage4_backward/launch.py"
GRAD_TILES = "stage4_backward/grad_tiles.py"
GRAD_KV_KERNEL = "stage4_backward/grad_kv_kernel.py"
POLICIES = "flash_attention_with_scores/eviction/policies.py"

MISTAKES = [
    Mistake(
        "sum_not_rescaled",
        SOFTMAX,
        "row_sum = state.row_sum * rescale + weights.sum(-1)",
        "row_sum = state.row_sum + weights.sum(-1)",
        STEP,
        "When the max grows, everything summed so far is relative to the old max and must be rescaled.",
    ),
    Mistake(
        "output_not_rescaled",
        SOFTMAX,
        "acc = state.acc * rescale[..., None] + weights @ v_tile",
        "acc = state.acc + weights @ v_tile",
        STEP,
        "The output so far carries the old max too; it needs the same factor as the sum.",
    ),
    Mistake(
        "no_max_subtraction",
        SOFTMAX,
        "weights = torch.exp(logits - shift[..., None])",
        "weights = torch.exp(logits)",
        TILED + "test_magnitudes[300.0]",
        "exp overflows fp32 beyond 88; subtracting the row's max keeps every exponent at or below 0.",
    ),
    Mistake(
        "first_tile_max_only",
        SOFTMAX,
        "new_max = torch.maximum(state.row_max, logits.amax(-1))",
        "new_max = torch.where(torch.isneginf(state.row_max), logits.amax(-1), state.row_max)",
        TILED + "test_magnitudes[300.0]",
        "A later tile can hold a larger logit than the first; the running max must follow it.",
    ),
    Mistake(
        "nan_in_empty_rows",
        SOFTMAX,
        "return row_max.masked_fill(torch.isneginf(row_max), 0)",
        "return row_max",
        TILED + "test_rows_that_see_nothing",
        "-inf - (-inf) is NaN: a row that has seen no key yet needs a finite shift.",
    ),
    Mistake(
        "lse_without_max",
        SOFTMAX,
        "lse = state.row_max + torch.log(state.row_sum)",
        "lse = torch.log(state.row_sum)",
        "test_stage1_online_softmax.py::test_finish",
        "The sum is relative to the max; the log-sum-exp adds the max back.",
    ),
    Mistake(
        "dropout_in_the_normaliser",
        SOFTMAX,
        "    row_sum = state.row_sum * rescale + weights.sum(-1)  # l_j = l_{j-1}·e^{m_{j-1}-m_j} + rowsum(P_j)\n"
        "    if weight_factor is not None:\n        weights = weights * weight_factor\n",
        "    if weight_factor is not None:\n        weights = weights * weight_factor\n"
        "    row_sum = state.row_sum * rescale + weights.sum(-1)\n",
        TILED + "test_dropout_given_its_mask",
        "Dropout acts on the finished softmax: dropped weights still count in the denominator.",
    ),
    Mistake(
        "missing_scale",
        LOOP,
        "scores = q_tile @ k_tile.transpose(-1, -2) * self.sm_scale",
        "scores = q_tile @ k_tile.transpose(-1, -2)",
        TILED + "test_dtypes",
        "Logits are q·kᵀ / √D, not q·kᵀ.",
    ),
    Mistake(
        "causal_from_the_top_left",
        LOOP,
        "offset = self.n_k - self.n_q",
        "offset = 0",
        TILED + "test_matches_oracle[b1-h6k2-m33n129-d24-causal]",
        "With a cache (M < N) the last query sees the last key: the mask hangs in the bottom-right corner.",
    ),
    Mistake(
        "greater_for_greater_or_equal",
        LOOP,
        "(distance >= -self.right)",
        "(distance > -self.right)",
        TILED + "test_matches_oracle[b2-h2k2-m16n16-d32-causal]",
        "A query sees its own key.",
    ),
    Mistake(
        "causal_ignored",
        "stage1_pytorch_tiled/visibility.py",
        "    if causal:\n",
        "    if False:\n",
        TILED + "test_matches_oracle[b2-h2k2-m16n16-d32-causal]",
        "is_causal has to reach the mask.",
    ),
    Mistake(
        "partial_tiles_dropped",
        LOOP,
        "for start in range(begin, stop, block):",
        "for start in range(begin, stop - block + 1, block):",
        TILED + "test_matches_oracle[b1-h2k1-m17n17-d16-full]",
        "The last tile may be smaller than the block, and still counts.",
    ),
    Mistake(
        "padding_ignored",
        LOOP,
        "if self.setting.key_padding_mask is not None:",
        "if False:",
        TILED + "test_key_padding",
        "Padded keys must get a logit of -inf.",
    ),
    Mistake(
        "heads_grouped_the_wrong_way",
        LOOP,
        "self.q = q.unflatten(1, (n_kv_heads, q.shape[1] // n_kv_heads))",
        "self.q = q.unflatten(1, (q.shape[1] // n_kv_heads, n_kv_heads)).transpose(1, 2)",
        TILED + "test_matches_oracle[b1-h4k2-m63n63-d64-causal]",
        "Query heads 0 … G-1 share key head 0: head // G, not head % Hk.",
    ),
    Mistake(
        "invisible_tiles_visited",
        LOOP,
        "            if seen is False:\n                continue\n            ",
        "            if seen is False:\n                seen = torch.tensor(False)\n            ",
        TILED + "test_only_visible_tiles_are_visited_once",
        "Half of a causal matrix is masked; a kernel that visits it does twice the work.",
    ),
    Mistake(
        "whole_matrix_in_memory",
        LOOP,
        "        self.n_q, self.n_k = q.shape[2], k.shape[2]\n",
        "        self.n_q, self.n_k = q.shape[2], k.shape[2]\n        self.logits = self.q @ self.k.mT\n",
        TILED + "test_never_makes_the_matrix",
        "The right answer with an M×N tensor is attention, but it is not flash attention.",
    ),
    Mistake(
        "one_pass_column_sums",
        LOOP,
        "weights = torch.exp(tile.logits - lse[..., q_rows, None])",
        "weights = torch.exp(tile.logits - finite(tile.logits.amax(-1))[..., None])",
        SUMS + "test_softmax_col_sums_add_up_to_the_rows_that_see_a_key",
        "A weight needs its row's final normaliser, so softmax column sums cannot be had in one pass.",
    ),
    Mistake(
        "masked_scores_summed",
        HOOKS,
        "return tile.scores if tile.visible is None else tile.scores.masked_fill(~tile.visible, 0)",
        "return tile.logits",
        SUMS + "test_hooks_with_masks",
        "Masked logits are -inf: a sum that touches one is -inf for good.",
    ),
    Mistake(
        "column_sum_of_the_last_tile",
        HOOKS,
        "col_sum += visible_scores(tile)",
        "col_sum[...] = visible_scores(tile)",
        SUMS + "test_hooks_match_oracle[b1-h4k2-m63n63-d64-causal-col_sum]",
        "Every block of queries adds to the same columns.",
    ),
    Mistake(
        "kernel_tail_not_masked",
        SIMPLE,
        "visible = k_idx[None, :] < n_k\n",
        "visible = k_idx[None, :] >= 0\n",
        FORWARD + "test_matches_oracle[b2-h3k3-m50n77-d7-full-simple_forward]",
        "Keys past the end load as 0, and a logit of 0 is not a weight of 0.",
    ),
    Mistake(
        "kernel_ignores_strides",
        SIMPLE,
        "q_idx[:, None] * q_strides[2]",
        "q_idx[:, None] * HEAD_DIM",
        FORWARD + "test_any_strides[simple_forward]",
        "Rows lie a stride apart, which is D only in a contiguous tensor.",
    ),
    Mistake(
        "kernel_masks_from_the_top_left",
        TILES,
        "position = q_idx[:, None] + mask.offset",
        "position = q_idx[:, None]",
        FORWARD + "test_matches_oracle[b1-h6k2-m33n129-d24-causal-forward]",
        "With a cache (M < N) the last query sees the last key: the mask hangs in the bottom-right corner.",
    ),
    Mistake(
        "kernel_sum_not_rescaled",
        TILES,
        "row_sum = state.row_sum * rescale + tl.sum(weights, 1)",
        "row_sum = state.row_sum + tl.sum(weights, 1)",
        FORWARD + "test_magnitudes[300.0-forward]",
        "When the max grows, everything summed so far is relative to the old max and must be rescaled.",
    ),
    Mistake(
        "kernel_lse_in_base_two",
        KERNEL,
        "lse_log2 * LN_2, mask",
        "lse_log2, mask",
        FORWARD + "test_matches_oracle[b1-h2k2-m64n64-d64-full-forward]",
        "The loop works in base 2; what it returns is the natural logarithm.",
    ),
    Mistake(
        "kernel_window_off_by_one",
        TILES,
        "k_idx[None, :] >= q_idx[:, None] + (mask.offset - mask.left)",
        "k_idx[None, :] > q_idx[:, None] + (mask.offset - mask.left)",
        FEATURES + "test_features[1-diagonal-self]",
        "A window of w sees w keys behind the query, not w - 1.",
    ),
    Mistake(
        "kernel_skips_the_edge_of_the_window",
        KERNEL,
        "EXISTS: tl.constexpr = (loop.mask.HAS_LEFT, True, HAS_TAIL)",
        "EXISTS: tl.constexpr = (False, True, HAS_TAIL)",
        FEATURES + "test_features[1-window-self]",
        "Tiles that the window's edge crosses are visited too, with a mask.",
    ),
    Mistake(
        "kernel_drops_the_tail",
        "stage2_triton_forward/launch.py",
        "HAS_TAIL=right is not None or n_k % config.block_n != 0,",
        "HAS_TAIL=right is not None,",
        FORWARD + "test_matches_oracle[b2-h3k3-m50n77-d7-full-forward]",
        "Keys that do not fill a tile still count.",
    ),
    Mistake(
        "kernel_ignores_padding",
        KERNEL,
        "if MASKED or loop.mask.HAS_PADDING:\n                logits",
        "if MASKED:\n                logits",
        FEATURES + "test_features[1-padding-self]",
        "A padded key may lie anywhere, so that no tile is whole.",
    ),
    Mistake(
        "kernel_groups_heads_the_wrong_way",
        KERNEL,
        "kv_head = place.head // loop.tiles.GROUP",
        "kv_head = place.head % loop.tiles.GROUP",
        FEATURES + "test_features[1-full-self]",
        "Query heads 0 … G-1 share key head 0: head // G.",
    ),
    Mistake(
        "kernel_keeps_without_scaling",
        TILES,
        "return tl.where(keep, weights * dropout.keep_scale, 0.0)",
        "return tl.where(keep, weights, 0.0)",
        FORWARD + "test_dropout_is_the_philox_of_stage_one",
        "Kept weights are scaled by 1 / (1 - p).",
    ),
    Mistake(
        "merge_in_the_wrong_base",
        "stage2_triton_forward/merge_kernel.py",
        "part_sums = tl.exp2((part_lse - shift) * LOG2_E)",
        "part_sums = tl.exp2(part_lse - shift)",
        FEATURES + "test_features[3-full-few queries]",
        "Parts are weighted by e^lse: the lse is a natural logarithm, and exp2 wants base 2.",
    ),
    Mistake(
        "masked_scores_stored",
        LOOP_HOOKS,
        "store_scores_async(tl.where(visible, logits, 0.0), place, k_start)",
        "store_scores_async(logits, place, k_start)",
        SCORES + "test_masked_scores_are_exactly_zero[causal window-200]",
        "The contract says 0 where a query does not see a key.",
    ),
    Mistake(
        "no_zeros_before_the_window",
        LOOP_HOOKS,
        "for k_start in range(0, begin, BLOCK_N):",
        "for k_start in range(0, 0, BLOCK_N):",
        SCORES + "test_masked_scores_are_exactly_zero[causal window-200]",
        "Tiles that nobody sees are not visited, and what nobody writes holds whatever was there.",
    ),
    Mistake(
        "no_zeros_behind_the_diagonal",
        LOOP_HOOKS,
        "for k_start in range(stop, k_stop, BLOCK):",
        "for k_start in range(stop, stop, BLOCK):",
        SCORES + "test_masked_scores_are_exactly_zero[diagonal-201]",
        "Tiles that nobody sees are not visited, and what nobody writes holds whatever was there.",
    ),
    Mistake(
        "compensation_dropped",
        LOOP_HOOKS,
        "return total, (total - row_sum) - addend",
        "return total, lost",
        ROW_SUM + "test_what_a_running_sum_loses_is_given_back",
        "What an addition rounds off is (total - before) - addend; the next addition must give it back.",
    ),
    Mistake(
        "masked_logits_in_the_row_sum",
        LOOP_HOOKS,
        "addend = tl.sum(tl.where(visible, logits, 0.0), 1) - lost",
        "addend = tl.sum(logits, 1) - lost",
        ROW_SUM + "test_features[window]",
        "A tile on the mask's edge holds logits of keys that the query does not see.",
    ),
    Mistake(
        "masked_infinity_in_the_column_sum",
        LOOP_HOOKS,
        "sums = tl.sum(tl.where(counted, logits, 0.0), 0)",
        'sums = tl.sum(tl.where(counted, logits, float("-inf")), 0)',
        COL_SUM + "test_features[M < N-window]",
        "-inf is what hides a key from a softmax; in a sum it stays for good.",
    ),
    Mistake(
        "atomics_on_top_of_the_last_call",
        LAUNCH,
        "ColSum(col_sum.zero_(), ",
        "ColSum(col_sum, ",
        COL_SUM + "test_a_reused_result_is_not_added_to",
        "Atomic additions need a zero to start from: without it the last call's sums are counted again.",
    ),
    Mistake(
        "atomics_count_a_tile_twice",
        LOOP_HOOKS,
        "((k_start - begin) // BLOCK_N + place.q_start // BLOCK_N) % n_tiles",
        "tl.minimum((k_start - begin) // BLOCK_N + place.q_start // BLOCK_N, n_tiles - 1)",
        COL_SUM + "test_orders_visit_every_tile_once[0-64-round_robin]",
        "An order is a permutation: past the last tile comes the first, or some are counted twice and others never.",
    ),
    Mistake(
        "atomics_in_the_wrong_group",
        LOOP_HOOKS,
        "(place.batch_head // args.group)",
        "(place.batch_head % args.group)",
        COL_SUM + "test_features[M < N-window]",
        "Query heads 0 … G-1 share key head 0, whose columns they add up: head // G.",
    ),
    Mistake(
        "atomics_split_off_by_one",
        LOOP_HOOKS,
        "counted = visible & (place.q_idx >= args.q_begin)[:, None]",
        "counted = visible & (place.q_idx > args.q_begin)[:, None]",
        COL_SUM + "test_region[atomic_reverse]",
        "Rows `split:` begin with row split itself.",
    ),
    Mistake(
        "linear_triangle_off_by_one",
        LINEAR,
        "(idx[None, :] < idx[:, None])",
        "(idx[None, :] <= idx[:, None])",
        LINEAR_SUMS + "test_matches_oracle[b2-h2k2-m16n16-d32-causal]",
        "Ends are exclusive: the m-th row of a chunk has m keys more than the first, not m + 1.",
    ),
    Mistake(
        "linear_prefix_holds_its_own_chunk",
        LINEAR,
        "last = tl.minimum(n_before, n_chunks) - 1",
        "last = tl.minimum(n_before, n_chunks - 1)",
        LINEAR_SUMS + "test_matches_oracle[b2-h4k2-m65n65-d32-causal]",
        "The first n chunks end with chunk n - 1; chunk n is where the end lies, and counts only in part.",
    ),
    Mistake(
        "linear_prefix_starts_anew",
        LINEAR,
        "before += tl.sum(chunks, 0)",
        "before = tl.sum(chunks, 0)",
        LINEAR_SUMS + "test_prefix_sums_carry_on_from_block_to_block",
        "A block of chunks begins with the sum of all blocks before it, not of the last one alone.",
    ),
    Mistake(
        "linear_forgets_the_group",
        LINEAR,
        "in tl.range(first_head, first_head + Y_HEADS, num_stages=3)",
        "in tl.range(first_head, first_head + 1, num_stages=3)",
        LINEAR_SUMS + "test_matches_oracle[b1-h2k1-m17n17-d16-full]",
        "A key's column is summed over all query heads that share it.",
    ),
    Mistake(
        "linear_split_off_by_one",
        LINEAR,
        "counts = (y_idx >= rows.y_begin)",
        "counts = (y_idx > rows.y_begin)",
        LINEAR_SUMS + "test_cross_token_regions[self-{}]",
        "Rows `split:` begin with row split itself.",
    ),
    Mistake(
        "kernel_one_pass_column_sums",
        COLUMNS,
        "final_weights(loop.to_logits, logits, scale, lse_log2[:, None])",
        "final_weights(loop.to_logits, logits, scale, (tl.max(logits, 1) * scale * 1.4426950408889634)[:, None])",
        SOFTMAX_SUMS + "test_sums_add_up_to_the_rows_that_see_a_key[full]",
        "A weight needs its row's final normaliser, so softmax column sums cannot be had in one pass.",
    ),
    Mistake(
        "kernel_queries_off_by_one",
        COLUMNS,
        "begin = tl.maximum(k_start - mask.right - behind - region.q_begin, 0)",
        "begin = tl.maximum(k_start + 1 - mask.right - behind - region.q_begin, 0)",
        SOFTMAX_SUMS + "test_visible_queries[16-39-40-causal]",
        "The first query that sees a key under a causal mask is the one that stands at it.",
    ),
    Mistake(
        "kernel_diagonal_taken_for_whole_tiles",
        COLUMNS,
        "tl.cdiv(tl.maximum(last_key - mask.right",
        "tl.cdiv(tl.maximum(k_start - mask.right",
        SOFTMAX_SUMS + "test_features[causal-self]",
        "A tile is whole where its queries see the last of its keys, not only the first.",
    ),
    Mistake(
        "kernel_sums_padded_keys",
        COLUMNS,
        "    if loop.mask.HAS_PADDING:  # nobody sees a key that is not real",
        "    if False:",
        SOFTMAX_SUMS + "test_features[padding-M > N]",
        "Whole tiles are not masked, so that a padded key gets weights which must be thrown away.",
    ),
    Mistake(
        "kernel_scales_stored_scores_again",
        COLUMNS,
        "            scale = 1.0\n",
        "",
        SOFTMAX_SUMS + "test_stored_scores_give_the_same_sums[causal]",
        "Scores are stored scaled.",
    ),
    Mistake(
        "column_sums_of_the_wrong_group",
        "stage3_scores_and_sums/column_sums.py",
        "torch.sum(parts.view(batch, n_kv_heads, group, k_stop), 2, out=out)",
        "torch.sum(parts.view(batch, group, n_kv_heads, k_stop), 1, out=out)",
        SOFTMAX_SUMS + "test_matches_oracle[b1-h4k2-m63n63-d64-causal]",
        "Query heads 0 … G-1 share key head 0: heads of a group lie side by side.",
    ),
    Mistake(
        "stats_not_rescaled",
        LOOP_HOOKS,
        "weighted_distance = weighted_distance * rescale + ",
        "weighted_distance = weighted_distance + ",
        STATS + "test_the_max_grows_from_tile_to_tile",
        "When the max grows, everything summed so far is relative to the old max and must be rescaled.",
    ),
    Mistake(
        "entropy_forgets_that_the_max_grew",
        LOOP_HOOKS,
        "(weighted_log + before.row_sum * fell) * rescale",
        "weighted_log * rescale",
        STATS + "test_the_max_grows_from_tile_to_tile",
        "log w is relative to the max too: when that grows by d, each of the logarithms so far falls by d.",
    ),
    Mistake(
        "softcap_ignored_in_the_second_walk",
        LAUNCH,
        'describe_logits(1.0, setting.softcap, "ieee")',
        'describe_logits(1.0, None, "ieee")',
        REDUCTION + "test_rows[softcap-M < N]",
        "Scores are kept before the softcap, weights come after it.",
    ),
    Mistake(
        "dropped_delta",
        RECOMPUTE,
        "return weights * (grad_weights + column_grads - delta), grad_v",
        "return weights * (grad_weights + column_grads), grad_v",
        RECOMPUTED + "test_matches_oracle[b1-h2k2-m64n64-d64-full]",
        "A weight that grows takes from the others of its row: hence the mean gradient, which is subtracted.",
    ),
    Mistake(
        "scale_forgotten_in_dk",
        RECOMPUTE,
        "(grad_k * grid.sm_scale).to(k.dtype)",
        "grad_k.to(k.dtype)",
        RECOMPUTED + "test_matches_oracle[b1-h2k2-m64n64-d64-full]",
        "Logits are s·q·kᵀ: both of dQ = s·dS·K and dK = s·dSᵀ·Q carry the scale.",
    ),
    Mistake(
        "group_not_summed",
        RECOMPUTE,
        "grad_v = (kept.mT @ grad_output).sum(2)",
        "grad_v = (kept.mT @ grad_output)[:, :, 0]",
        RECOMPUTED + "test_matches_oracle[b1-h4k2-m63n63-d64-causal]",
        "Values that several query heads share get the gradients of all of them.",
    ),
    Mistake(
        "nan_from_rows_that_see_nothing",
        RECOMPUTE,
        "logits - row_lse.masked_fill(torch.isneginf(row_lse), 0)",
        "logits - row_lse",
        RECOMPUTED + "test_rows_that_see_nothing[output and lse]",
        "Where a row sees no key both are -inf, and -inf - (-inf) is NaN.",
    ),
    Mistake(
        "gradient_of_dropped_weights",
        RECOMPUTE,
        "    grad_weights = grad_weights if factor is None else grad_weights * factor\n",
        "",
        RECOMPUTED + "test_dropout_is_drawn_again",
        "A weight that was dropped did not reach the output, and one that was kept reached it scaled.",
    ),
    Mistake(
        "softcap_not_differentiated",
        RECOMPUTE,
        "grad_logits = grad_logits * (1 - torch.tanh(tile.scores / setting.softcap) ** 2)",
        "grad_logits = grad_logits * 1",
        RECOMPUTED + "test_features[softcap-self]",
        "d/dx c·tanh(x/c) = 1 - tanh²(x/c): a capped logit passes on less.",
    ),
    Mistake(
        "sinks_pulled_the_wrong_way",
        RECOMPUTE,
        "return -(weights * delta)",
        "return (weights * delta)",
        RECOMPUTED + "test_features[sinks-self]",
        "A sink gives no value, so that its dP is 0, and P·(0 - delta) is left.",
    ),
    Mistake(
        "backward_forgets_is_causal",
        "stage4_backward/autograd.py",
        "Gradients(output=grad_output), Setting(causal=ctx.is_causal))",
        "Gradients(output=grad_output), Setting())",
        AUTOGRAD + "test_output_and_gradients[FlashAttentionPyTorchFunc-b1-h4k2-m21n90-d16-causal-True]",
        "What the backward pass recomputes must be masked as the forward pass was.",
    ),
    Mistake(
        "gradient_of_the_lse_with_the_wrong_sign",
        BACKWARD,
        "extra = None if grads.lse is None else -grads.lse.float()",
        "extra = None if grads.lse is None else grads.lse.float()",
        DELTA + "test_what_else_hangs_on_the_normaliser[lse-b2-h2k1-m70n70-d32-causal]",
        "d lse_i / d s_ij = P_ij, and dS = P ∘ (dP - delta): what is added to dS is subtracted from delta.",
    ),
    Mistake(
        "kernel_dropped_delta",
        GRAD_TILES,
        "grad = weights * (grad_weights - delta)",
        "grad = weights * grad_weights",
        KERNELS + "test_matches_oracle[grad_q-b1-h2k2-m64n64-d64-full]",
        "A weight that grows takes from the others of its row: hence the mean gradient, which is subtracted.",
    ),
    Mistake(
        "kernel_softcap_not_differentiated",
        GRAD_TILES,
        "grad *= 1.0 - squashed * squashed",
        "grad *= 1.0",
        KERNELS + "test_features[grad_q-softcap-self]",
        "d/dx c·tanh(x/c) = 1 - tanh²(x/c): a capped logit passes on less.",
    ),
    Mistake(
        "gradient_of_masked_scores",
        GRAD_TILES,
        "inside = visible & (q_idx < mask.n_q)",
        "inside = (q_idx < mask.n_q)",
        KERNELS + "test_losses[grad_q-scores-M < N]",
        "A masked score is 0 whatever q and k are: its gradient goes nowhere.",
    ),
    Mistake(
        "gradient_of_columns_not_cut_to_its_region",
        GRAD_TILES,
        "tl.where((q_idx >= score_grads.q_begin) & (q_idx < score_grads.q_stop), columns, 0.0)",
        "tl.where(q_idx >= 0, columns, 0.0)",
        KERNELS + "test_losses[grad_kv-some queries-M < N]",
        "Queries that were not summed have no part in the sum's gradient.",
    ),
    Mistake(
        "kernel_causal_greater_for_greater_or_equal",
        "stage4_backward/grad_q_kernel.py",
        "visible = visible_tile(loop.mask, queries.batch, queries.q_idx, k_idx)",
        "visible = visible_tile(loop.mask, queries.batch, queries.q_idx - 1, k_idx)",
        KERNELS + "test_matches_oracle[grad_q-b2-h2k2-m16n16-d32-causal]",
        "A query sees its own key, in the backward pass too.",
    ),
    Mistake(
        "kernel_gradient_of_dropped_weights",
        "stage4_backward/grad_q_kernel.py",
        "grad_weights *= dropped(loop.dropout, queries.batch_head, queries.q_idx, k_idx)",
        "grad_weights *= 1.0",
        KERNELS + "test_dropout_is_drawn_again[grad_q]",
        "A weight that was dropped did not reach the output, and one that was kept reached it scaled.",
    ),
    Mistake(
        "kernel_transposed_weights",
        GRAD_KV_KERNEL,
        "grad_v = dot(kept.to(grad_out.dtype), grad_out, grad_v,",
        "grad_v = dot(tl.trans(kept).to(grad_out.dtype), grad_out, grad_v,",
        KERNELS + "test_matches_oracle[grad_kv-b1-h2k2-m64n64-d64-full]",
        "dV = Pᵀ·dO, and the tile stands transposed already: Sᵀ = K·Qᵀ.",
    ),
    Mistake(
        "kernel_scale_forgotten_in_dk",
        GRAD_KV_KERNEL,
        "grad_k * loop.to_logits.scale",
        "grad_k",
        KERNELS + "test_matches_oracle[grad_kv-b1-h2k2-m64n64-d64-full]",
        "Logits are s·q·kᵀ: both of dQ = s·dS·K and dK = s·dSᵀ·Q carry the scale.",
    ),
    Mistake(
        "kernel_group_not_summed",
        GRAD_KV_KERNEL,
        "tl.range(0, n_tiles * loop.tiles.GROUP, ",
        "tl.range(0, n_tiles, ",
        GRAD_KV + "test_query_heads_of_a_group_add_up",
        "A program owns a key tile for all query heads that share it.",
    ),
    Mistake(
        "kernel_values_get_dropped_weights",
        GRAD_KV_KERNEL,
        "            kept = weights * factor\n",
        "",
        KERNELS + "test_dropout_is_drawn_again[grad_kv]",
        "dV = (P ∘ Z)ᵀ·dO, with the mask Z that the forward pass drew: the seed gives it again.",
    ),
    Mistake(
        "vector_triangle_off_by_one",
        "stage4_backward/linear_grad_kernel.py",
        "idx[None, :] < idx[:, None]",
        "idx[None, :] <= idx[:, None]",
        LINEAR_GRADS + "test_matches_oracle[b2-h2k2-m16n16-d32-causal]",
        "Ends are exclusive: the m-th row of a chunk has m vectors more than the first, not m + 1.",
    ),
    Mistake(
        "padding_taken_for_sinks",
        POLICIES,
        "    values = values.masked_fill(positions == PADDING, torch.finfo(values.dtype).min)\n",
        "",
        EVICTION + "test_first_tokens_are_behind_the_padding_StreamingLLM",
        "The first columns of a batch are padding in all but its longest sequence.",
    ),
    Mistake(
        "heavy_token_kept_twice",
        POLICIES,
        "largest(scores, positions, budget - n_recent, recent)",
        "largest(scores, positions, budget - n_recent)",
        EVICTION + "test_keeps_what_lists_choose[fresh-H2O-0-10]",
        "A recent token may be heavy as well; it must not use up two places.",
    ),
    Mistake(
        "median_of_all_tokens",
        POLICIES,
        ".scatter(-1, taken, torch.nan)",
        "",
        EVICTION + "test_keeps_what_lists_choose[fresh-CAB-0-10]",
        "Bridges lie in the middle of what is left once local and important tokens are taken.",
    ),
    Mistake(
        "window_lends_its_scores",
        POLICIES,
        "older = scores.scatter(-1, recent, 0.0)",
        "older = scores",
        EVICTION + "test_keeps_what_lists_choose[fresh-SnapKV-1-10]",
        "Pooling reaches over the border: the window's own keys would draw their last neighbours in.",
    ),
    Mistake(
        "heads_keep_the_same",
        POLICIES,
        "    return values.topk(count, dim=-1).indices",
        "    return values.sum(1, keepdim=True).topk(count, dim=-1).indices.expand(-1, values.shape[1], -1)",
        EVICTION + "test_heads_choose_for_themselves[H2O]",
        "Each key head looks for something else, so each keeps its own set.",
    ),
]
