"""What `benchmark/mutation.py` tries: files, the tests that must notice their mutants, and mutants that none can."""

LINEAR = [
    "test_stage3_linear_sums.py::test_prefix_sums_carry_on_from_block_to_block",
    "test_stage3_col_sum.py::test_sums_of_query_tiles",
    "test_stage3_linear_sums.py::test_same_bits_twice_and_where_it_is_told_to",
    "test_stage3_linear_sums.py::test_scale_and_strides",
    "test_stage3_linear_sums.py::test_matches_oracle[b1-h1k1-m20n36-d256-causal]",
    "test_stage3_linear_sums.py::test_padding",
    "test_stage3_linear_sums.py::test_cross_token_regions",
    "test_stage3_linear_sums.py::test_masks",
    "test_stage3_linear_sums.py::test_half_precision",
    "test_stage3_linear_sums.py::test_accuracy",
    "test_stage3_col_sum.py::test_sums_of_query_tiles_are_taken_as_given",
]
LINEAR_GRADS = [
    "test_stage4_linear_grads.py::test_expanded_gradients",
    "test_stage4_linear_grads.py::test_empty_tensors",
    "test_stage4_linear_grads.py::test_scale_and_strides",
    "test_stage4_linear_grads.py::test_padding",
    "test_stage4_linear_grads.py::test_cross_token_regions",
    "test_stage4_linear_grads.py::test_another_default_dtype_changes_nothing",
]
SUMS = [
    "test_library_sums.py::test_every_function_matches_the_oracle",
    "test_library_sums.py::test_buffers_of_the_caller",
    "test_library_sums.py::test_reused_buffers",
    "test_library_sums.py::test_part_of_the_queries",
]
HUGGINGFACE = [
    "test_library_huggingface_masks.py",
    "test_library_huggingface.py::test_masks_of_the_callers_own",
    "test_library_huggingface.py::test_masks_that_cannot_be_kept",
    "test_library_huggingface.py::test_weights_are_wanted_only_while_somebody_asks",
    "test_library_huggingface.py::test_gpt2_scales",
    "test_library_huggingface.py::test_gpt2_cross_attention",
    "test_library_huggingface.py::test_weights_slot_and_filter",
    "test_library_huggingface.py::test_nothing_is_as_large_as_a_mask",
    "test_library_huggingface.py::test_pads_between_turns_give_no_attention",
    "test_library_huggingface.py::test_keys_that_were_dropped_behind_the_layers_back",
    "test_library_huggingface.py::test_models_that_are_refused",
    "test_library_huggingface.py::test_a_cache_that_is_not_known",
    "test_library_huggingface.py::test_a_module_that_bypasses_the_interface_is_noticed",
    "test_library_huggingface.py::test_encoder_and_decoder",
    "test_library_huggingface.py::test_generate_returns_attentions",
    "test_library_huggingface.py::test_reset_and_fresh_and_interleaved_caches",
    "test_library_huggingface.py::test_dropout_changes_the_output_and_not_the_scores",
    "test_library_eviction.py::test_eviction_with_padding_in_a_later_turn",
    "test_library_huggingface.py::test_output_weights_and_scores_equal_eager",
    "test_library_huggingface.py::test_chunks_and_single_tokens_add_up_to_the_whole",
    "test_library_huggingface.py::test_generate",
]
OPCHECKS = [
    "test_library_gradients.py::test_an_operator_gives_its_output_and_sinks_their_gradients",
    "test_library_api.py::test_only_plain_calls_pass_the_operators_by",
    "test_library_attention.py::test_opcheck",
    "test_library_sums.py::test_opcheck",
    "test_library_sums.py::test_opcheck_of_the_scores_alone",
    "test_library_gradients.py::test_opcheck_of_attention",
    "test_library_gradients.py::test_opcheck_of_statistics",
    "test_library_gradients.py::test_opcheck_of_scores_alone",
    "test_library_gradients.py::test_opcheck_of_the_backward_pass",
]
DIFFERENTIATED = [
    "test_library_gradients.py::test_every_result_is_differentiable",
    "test_library_gradients.py::test_scores_alone",
    "test_library_gradients.py::test_sums_over_a_part_of_the_queries",
    "test_library_gradients.py::test_no_graph_where_none_is_wanted",
    "test_library_gradients.py::test_gradients_of_some_inputs_only",
    "test_library_gradients.py::test_two_of_the_stats_have_no_gradient_and_their_output_has",
    "test_library_gradients.py::test_fp8_has_no_backward_pass",
    "test_library_gradients.py::test_dropout_is_drawn_again",
    "test_library_gradients.py::test_backward_twice",
]
BACKENDS = [
    "test_library_sums.py::test_every_function_matches_the_oracle",
    "test_library_statistics.py::test_stats_match_the_oracle",
    "test_library_statistics.py::test_reductions_match_the_oracle",
    "test_library_statistics.py::test_folds_that_cannot_be_used",
    "test_library_sums.py::test_buffers_of_the_caller",
    "test_library_sums.py::test_reused_buffers",
    "test_library_sums.py::test_only_buffered_sums_keep_the_scores_of_their_region",
    "test_library_sums.py::test_part_of_the_queries",
    "test_library_attention.py::test_options",
]
TESTS = {  # by file, the likeliest and fastest first: files and tests of the folder of tests
    "stage1_pytorch_tiled/visibility.py": [
        "test_stage1_tiled_forward.py",
        "test_stage1_tile_grid.py",
        "test_stage2_tiles.py::test_visible_keys",
        "test_stage2_features.py::test_features",
    ],
    "stage2_triton_forward/describe.py": [
        "test_stage2_forward.py::test_unaligned_storage",
        "test_stage2_forward.py::test_any_strides",
        "test_stage2_forward.py::test_scale",
        "test_stage2_forward.py::test_negative_scale_in_whole_tiles",
        "test_stage2_forward.py::test_dropout_is_the_philox_of_stage_one",
        "test_launcher.py::test_a_result_is_filled_in_place_where_a_descriptor_takes_it",
        "test_stage2_tiles.py::test_visible_tile",
        "test_stage2_features.py::test_everything_at_once",
        "test_stage2_features.py::test_values_of_another_width",
        "test_stage2_features.py::test_fp8",
        "test_library_attention.py::test_sinks_and_padding_may_have_any_strides",
        "test_stage4_kernels.py::test_unaligned_storage",
        "test_stage4_kernels.py::test_any_strides",
        "test_stage2_features.py::test_features",
    ],
    "stage2_triton_forward/launcher.py": [
        "test_stage2_forward.py::test_three_dimensional_inputs",
        "test_stage2_features.py::test_everything_at_once",
    ],
    "stage2_triton_forward/launch.py": [
        "test_stage2_forward.py::test_unaligned_storage",
        "test_stage2_forward.py::test_rows_that_see_nothing",
        "test_stage2_features.py::test_everything_at_once",
        "test_stage2_forward.py::test_three_dimensional_inputs",
        "test_stage2_forward.py::test_any_strides",
        "test_stage2_forward.py::test_empty_tensors",
        "test_stage2_forward.py::test_scale",
        "test_stage2_forward.py::test_dropout_is_the_philox_of_stage_one",
        "test_stage2_features.py::test_many_splits_of_few_keys",
        "test_stage2_features.py::test_values_of_another_width",
        "test_stage2_features.py::test_fp8",
        "test_launcher.py::test_what_a_call_does_chooses_its_tiles",
        "test_stage2_forward.py::test_another_default_dtype_changes_nothing",
        "test_stage3_scores.py::test_region",
        "test_stage2_features.py::test_features",
    ],
    "stage3_scores_and_sums/launch.py": [
        "test_stage3_scores.py::test_region",
        "test_stage3_col_sum.py::test_region",
        "test_stage3_col_sum.py::test_a_reused_result_is_not_added_to",
        "test_stage3_col_sum.py::test_what_an_algorithm_runs",
        "test_stage3_col_sum.py::test_output_and_lse_go_where_they_are_told_to",
        "test_stage3_col_sum.py::test_sums_of_query_tiles",
        "test_stage3_row_sum.py::test_writes_where_it_is_told_to_and_the_same_bits_twice",
        "test_stage3_row_sum.py::test_half_precision",
        *SUMS,
        "test_stage3_scores.py::test_features",
        "test_stage3_stats.py::test_features",
        "test_stage3_stats.py::test_rows_that_see_nothing",
        "test_stage3_reduction.py::test_start",
        "test_stage3_reduction.py::test_rows",
        "test_stage3_reduction.py::test_half_precision",
        "test_library_sums.py::test_algorithms_agree",
        "test_library_sums.py::test_empty_tensors_and_empty_sums",
        "test_library_statistics.py::test_empty_tensors",
        "test_stage3_scores.py::test_dropout_leaves_the_scores_alone",
        "test_stage3_col_sum.py::test_dropout_leaves_the_sums_alone",
        "test_stage3_stats.py::test_dropout_leaves_the_stats_alone",
    ],
    "stage4_backward/launch.py": [
        "test_stage4_kernels.py::test_everything_at_once",
        "test_stage4_kernels.py::test_losses",
        "test_stage4_kernels.py::test_unaligned_storage",
        "test_stage4_kernels.py::test_losses_in_half_precision",
        "test_stage4_kernels.py::test_values_of_another_width",
        "test_stage4_kernels.py::test_matches_oracle[b2-h3k3-m50n77-d7-full]",
        "test_stage4_kernels.py::test_empty_tensors",
        "test_library_gradients.py::test_fp8_has_no_backward_pass",
        "test_stage4_kernels.py::test_features",
        "test_library_gradients.py::test_every_result_is_differentiable",
        "test_library_gradients.py::test_sums_over_a_part_of_the_queries",
        "test_stage4_delta.py",
    ],
    "flash_attention_with_scores/problem.py": [
        "test_library_api.py",
        "test_library_attention.py",
        "test_library_gradients.py::test_autocast",
        "test_library_gradients.py::test_autocast_casts_what_is_not_cast_yet",
        "test_library_gradients.py::test_autocast_leaves_fp64_alone",
        "test_library_gradients.py::test_checkpointing_draws_the_same_seed",
        *SUMS,
    ],
    "flash_attention_with_scores/sums.py": [
        *SUMS,
        "test_library_sums.py::test_bad_input_of_the_cross_token_sums",
        "test_library_sums.py::test_bad_input",
        "test_library_sums.py::test_both_backends_take_every_algorithm",
        "test_library_api.py::test_a_seed_that_is_not_given_is_drawn_anew",
        "test_library_api.py::test_sequential_sums_have_the_defaults_of_the_others",
        "test_library_sums.py::test_a_split_past_the_last_query",
        "test_library_sums.py::test_buffers_do_not_go_with_gradients",
        "test_library_gradients.py::test_buffers_do_not_go_with_gradients",
        "test_library_gradients.py::test_buffered_and_sequential_sums",
    ],
    "flash_attention_with_scores/triton_backend.py": BACKENDS,
    "flash_attention_with_scores/pytorch_backend.py": [
        *BACKENDS,
        "test_library_gradients.py::test_scores_of_keys_that_nobody_sees_have_gradients_of_zero",
        *DIFFERENTIATED,
        "test_library_gradients.py::test_gradcheck",
        "test_library_api.py::test_only_the_scores_are_of_quadratic_size",
        "test_library_sums.py::test_empty_tensors_and_empty_sums",
    ],
    "stage4_backward/operators.py": [
        *OPCHECKS,
        *DIFFERENTIATED,
        "test_library_gradients.py::test_compiles_into_one_graph",
    ],
    "stage4_backward/differentiable.py": DIFFERENTIATED,
    "stage4_backward/gradients.py": [
        "test_library_gradients.py::test_column_sums_are_of_all_queries_where_nothing_else_is_said",
        *DIFFERENTIATED,
        *OPCHECKS,
    ],
    "stage4_backward/statistics.py": [*OPCHECKS, *DIFFERENTIATED],
    "flash_attention_with_scores/huggingface/attention.py": HUGGINGFACE,
    "flash_attention_with_scores/huggingface/masks.py": HUGGINGFACE,
    "flash_attention_with_scores/eviction/cache.py": ["test_library_eviction.py", "test_stage5_eviction.py"],
    "flash_attention_with_scores/validation.py": [
        "test_library_api.py::test_bad_input_is_refused_by_name",
        "test_library_attention.py::test_bad_input_is_refused_by_name",
        "test_library_statistics.py::test_bad_input_is_refused_by_name",
        "test_library_statistics.py::test_folds_that_cannot_be_used",
        "test_library_cumulative.py::test_wrong_scores_are_refused",
        "test_library_attention.py::test_values_at_the_bounds_are_taken",
        "test_library_sums.py::test_bad_input_of_the_cross_token_sums",
        "test_library_sums.py::test_bad_input",
        "test_library_sums.py::test_buffers_beside_the_inputs",
        "test_library_sums.py::test_what_all_functions_refuse",
        "test_library_api.py::test_the_kernels_refuse_fp64",
        "test_library_api.py::test_fp64_on_the_pytorch_backend",
        "test_library_attention.py::test_fp8_descales",
        "test_library_cumulative.py::test_scores_stay_as_they_are_and_carry_gradients",
        "test_library_cumulative.py::test_fp8_is_refused",
    ],
    "stage3_scores_and_sums/linear_sums.py": LINEAR,
    "stage3_scores_and_sums/linear_sum_kernel.py": LINEAR,
    "stage4_backward/linear_grads.py": LINEAR_GRADS,
    "stage4_backward/linear_grad_kernel.py": LINEAR_GRADS,
}

ONLY = {  # functions of a file whose mutants are tried, where the others run on a GPU alone
    "stage2_triton_forward/launcher.py": ("_launch_by_triton", "as_triton_takes_it"),
}

NOTHING_COUNTED = "saves the launch; the kernels add up nothing to 0 as well"
NOT_STORED = "rows past the end are computed, but not stored"
AS_LONG = "a tensor has as many strides as sizes"
ONE_OF_TWO = "of two parts one is causal order, so that the other is a window in either case"
PAST_THE_END = "y_stop is the last row's end, and what a tile loads past it is 0"
ALL_TRUE = "true of every column, and there to give the mask its shape"
KEPT_TWICE = "the sinks are saved for the backward pass, which puts them back, in any case"
ALL_GIVEN = "the library gives an operator all of its own arguments; their defaults are for other callers"
UNDER_BUDGET = "a layer that holds nothing is under every budget"
PLACEHOLDER = "a placeholder: where weights are dropped the seed is put in its place, elsewhere nobody reads it"
LAST_BLOCK = "chunks past the last one come after all that are stored, and nothing follows their block"
NO_ROW = "there is no row before the first one, and what a tile loads there is 0"
NOT_READ = "nobody reads it in this case"
EMPTY_GRID = "saves the launch; of an empty grid nothing runs"
THROWN_AWAY = "the output is thrown away; it takes time alone"
SPEED = "decides about nothing but the order of programs or the size of tiles"
DONE_TWICE = "transformers' own `reset` does it as well, in the version that is installed"
AS_GOOD_AS_NONE = "0 and None stand alike for the width of the tensor itself"
APPLY = "return _Attention.apply(attend, backward, statistic, setting._replace({}), own, q, k, v, setting.sinks)"
COL_SUM_OWN = '{{"algorithm": ("str", "linear"), "q_begin": ("int", {}), "k_stop": ("int?", None)}},'
DOOR = "setting = Setting(causal, sm_scale, dropout_p, {}, window, softcap, sinks, key_padding_mask)"
DOORS = (
    "attention_with_row_sum",
    "attention_with_col_sum",
    "attention_with_softmax_col_sum",
    "attention_cross_token_qk_sum",
    "attention_cross_token_softmax_sum",
    "attention_cross_token_softmax_sum_buffered",
)
OF_TILES = (
    "y_desc, rows, Ends(sums, None, *bounds, {}, 0, sums.shape[2], {}, *map(constant, constants)), n_sums, config"
)
CHUNKS = "chunks = tl.load(cells, mask=inside{})"
EQUIVALENT = [  # (file, function, the line, what it became, why nobody can tell)
    (
        "stage4_backward/linear_grads.py",
        "_interval_vectors",
        "if out.numel() == 0 or counted[0] >= counted[1] or y.numel() == 0:",
        "if out.numel() == 0 or counted[0] > counted[1] or y.numel() == 0:",
        NOTHING_COUNTED,
    ),
    (
        "stage3_scores_and_sums/linear_sums.py",
        "_interval_sums",
        "if counted[0] >= counted[1] or y.numel() == 0:",
        "if counted[0] > counted[1] or y.numel() == 0:",
        NOTHING_COUNTED,
    ),
    (
        "stage4_backward/linear_grad_kernel.py",
        "interval_vector_kernel",
        "result *= tl.load(factor_ptr + row + x_idx, mask=x_idx < n_out, other=0.0)[:, None]",
        "result *= tl.load(factor_ptr + row + x_idx, mask=x_idx < n_out, other=(-1.0))[:, None]",
        NOT_STORED,
    ),
    (
        "stage4_backward/linear_grad_kernel.py",
        "interval_vector_kernel",
        "result *= tl.load(factor_ptr + row + x_idx, mask=x_idx < n_out, other=0.0)[:, None]",
        "result *= tl.load(factor_ptr + row + x_idx, mask=x_idx < n_out, other=1.0)[:, None]",
        NOT_STORED,
    ),
    (
        "flash_attention_with_scores/eviction/cache.py",
        "EvictingLayer.evict",
        "n_kept = 0 if self.positions is None else self.positions.shape[-1]",
        "n_kept = (-1) if self.positions is None else self.positions.shape[-1]",
        UNDER_BUDGET,
    ),
    (
        "flash_attention_with_scores/validation.py",
        "_span",
        "length = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) + 1",
        "length = sum((size - 1) * step for size, step in zip(x.shape, x.stride())) + 1",
        AS_LONG,
    ),
    (
        "flash_attention_with_scores/huggingface/masks.py",
        "_is_causal",
        'windows = [part for part in parts if part.__qualname__ == "sliding_window_overlay.<locals>.inner_mask"]',
        'windows = [part for part in parts if part.__qualname__ != "sliding_window_overlay.<locals>.inner_mask"]',
        ONE_OF_TWO,
    ),
    (
        "stage3_scores_and_sums/linear_sum_kernel.py",
        "counted",
        "counts = (y_idx >= rows.y_begin) & (y_idx < rows.y_stop)",
        "counts = (y_idx >= rows.y_begin) & (y_idx <= rows.y_stop)",
        PAST_THE_END,
    ),
    (
        "stage3_scores_and_sums/linear_sum_kernel.py",
        "prefix",
        "return tl.load(cells, mask=(last >= 0) & (tl.arange(0, BLOCK_D) >= 0), other=0.0)",
        "return tl.load(cells, mask=(last >= 0) & (tl.arange(0, BLOCK_D) >= (-1)), other=0.0)",
        ALL_TRUE,
    ),
    ("stage4_backward/differentiable.py", "differentiable", APPLY.format("sinks=None"), APPLY.format(""), KEPT_TWICE),
    (
        "stage4_backward/differentiable.py",
        "differentiable",
        APPLY.format("sinks=None"),
        APPLY.format("sinks=0"),
        KEPT_TWICE,
    ),
    ("stage4_backward/statistics.py", "", COL_SUM_OWN.format(0), COL_SUM_OWN.format(1), ALL_GIVEN),
    ("stage4_backward/statistics.py", "", COL_SUM_OWN.format(0), COL_SUM_OWN.format("(-1)"), ALL_GIVEN),
    ("stage4_backward/statistics.py", "", '"q_begin": ("int", 0),', '"q_begin": ("int", 1),', ALL_GIVEN),
    ("stage4_backward/statistics.py", "", '"q_begin": ("int", 0),', '"q_begin": ("int", (-1)),', ALL_GIVEN),
    (
        "stage4_backward/statistics.py",
        "",
        '"per_query_head": ("bool", False),',
        '"per_query_head": ("bool", True),',
        ALL_GIVEN,
    ),
    ("stage4_backward/statistics.py", "", '"buffered": ("bool", False),', '"buffered": ("bool", True),', ALL_GIVEN),
    *(
        ("flash_attention_with_scores/sums.py", door, DOOR.format(0), DOOR.format(seed), PLACEHOLDER)
        for door in DOORS
        for seed in ("1", "(-1)")
    ),
    *(
        (
            "stage3_scores_and_sums/linear_sum_kernel.py",
            "prefix_sum_kernel",
            CHUNKS.format(", other=0.0"),
            CHUNKS.format(other),
            LAST_BLOCK,
        )
        for other in ("", ", other=1.0", ", other=(-1.0)")
    ),
    *(
        ("stage3_scores_and_sums/linear_sums.py", "summed_chunks", OF_TILES.format(0, 0), OF_TILES.format(*x), NOT_READ)
        for x in ((1, 0), ("(-1)", 0), (0, 1), (0, "(-1)"))
    ),
    (
        "stage4_backward/linear_grads.py",
        "linear_row_sum_grads",
        "grad_k = _interval_vectors(k, weighted, query_ends(sides), (0, n_q), setting, True)",
        "grad_k = _interval_vectors(k, weighted, query_ends(sides), ((-1), n_q), setting, True)",
        NO_ROW,
    ),
    (
        "stage3_scores_and_sums/linear_sums.py",
        "linear_col_sum",
        "q_begin: int = 0,",
        "q_begin: int = (-1),",
        NO_ROW,
    ),
    (
        "flash_attention_with_scores/triton_backend.py",
        "attention_with_softmax_col_sum",
        'scores=_reused(room, "scores", n_stored, q.dtype, q) if buffered else None,',
        'scores=_reused(room, "scores", n_stored, q.dtype, q) if buffered else 0,',
        NOT_READ,
    ),
    (
        "stage2_triton_forward/describe.py",
        "describe_logits",
        "cap = 1.0 if softcap is None else float(softcap)",
        "cap = 0.0 if softcap is None else float(softcap)",
        NOT_READ,
    ),
    (
        "stage2_triton_forward/describe.py",
        "describe_logits",
        "cap = 1.0 if softcap is None else float(softcap)",
        "cap = 2.0 if softcap is None else float(softcap)",
        NOT_READ,
    ),
    (
        "stage2_triton_forward/describe.py",
        "descriptor",
        "def descriptor(x: Tensor, block_rows: int, block_d: int | None = None) -> TileDescriptor:",
        "def descriptor(x: Tensor, block_rows: int, block_d: int | None = 0) -> TileDescriptor:",
        AS_GOOD_AS_NONE,
    ),
    (
        "stage2_triton_forward/describe.py",
        "_layout",
        "steps = [free if size == 1 else step for size, step in zip(shape[:3], strides[:3], strict=True)]",
        "steps = [free if size == 1 else step for size, step in zip(shape[:3], strides[:3])]",
        AS_LONG,
    ),
    (
        "stage2_triton_forward/launch.py",
        "simple_forward",
        "if q.numel() == 0:",
        "if q.numel() == (-1):",
        EMPTY_GRID,
    ),
    (
        "stage2_triton_forward/launch.py",
        "forward",
        "rows_differ = left is not None or right is not None",
        "rows_differ = left is not None or right is None",
        SPEED,
    ),
    (
        "stage3_scores_and_sums/launch.py",
        "fold_rows",
        "forward(q, k, k, second_pass(setting), hook=hooks.FOLD_ROWS.given(args), compute_output=False)",
        "forward(q, k, k, second_pass(setting), hook=hooks.FOLD_ROWS.given(args), compute_output=True)",
        THROWN_AWAY,
    ),
    (
        "flash_attention_with_scores/pytorch_backend.py",
        "softmax_col_sum",
        "return tiled_softmax_col_sum(q, k, lse, setting, **region, **_TILES)",
        "return tiled_softmax_col_sum(q, k, lse, setting, **region)",
        SPEED,
    ),
    (
        "flash_attention_with_scores/eviction/cache.py",
        "EvictingLayer.reset",
        "self.keys = self.values = None",
        "pass",
        DONE_TWICE,
    ),
]
