"""The names of Megatron, modelopt, transformers and torch that we use although they are private, or replace.

The work on a new release of these libraries begins with the two tables below;
tests/unit/upstream/test_touched_names.py compares them with the libraries and with our source.
"""

from typing import NamedTuple

from megatron_dms.upstream import cpu

BOUND = "bound"
FIELDS = "fields: "
SOURCE = "source: "


class Touch(NamedTuple):
    """One name of theirs that one file of ours relies on."""

    file: str
    """Our file, below megatron_dms/."""
    theirs: str
    """Where the name is defined: MODULE:NAME, or MODULE:CLASS.NAME."""
    expected: str
    """What we rely on: parameters, as `parameters` writes them; BOUND, any value; FIELDS and the fields of a
    class; SOURCE and a text that the module holds."""
    name: str = ""
    """The name that our source uses, if it is not `theirs`: where they import it, or an attribute alone."""

    @property
    def used(self) -> str:
        return self.name or self.theirs.replace(":", ".")


DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
CLASS = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer."
WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"

# Private names that we use, and names that we replace. `test_the_table_is_complete` finds them in our source.
TOUCHES = [
    Touch(
        "upstream/cpu.py",
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        "(device=, clone=, graph_safe=)",
    ),
    Touch(
        "upstream/cpu.py",
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        "(new_state, device=, graph_safe=)",
    ),
    Touch("upstream/wheel.py", "megatron.core.datasets.utils:compile_helpers", "()"),
    Touch("upstream/megatron_loggers.py", "megatron.training.global_vars:_GLOBAL_TENSORBOARD_WRITER", BOUND),
    Touch(
        "upstream/megatron_distributed_optimizer.py",
        f"{DISTRIBUTED}.state_dict",
        "(self)",
        CLASS + "state_dict",
    ),
    Touch(
        "upstream/megatron_distributed_optimizer.py",
        f"{DISTRIBUTED}.load_state_dict",
        "(self, state_dict)",
        CLASS + "load_state_dict",
    ),
    Touch(
        "upstream/megatron_distributed_optimizer.py",
        f"{DISTRIBUTED}.sharded_param_state_dp_reshardable",
        "(self, model_sharded_state_dict, is_loading=, metadata=)",
        CLASS + "sharded_param_state_dp_reshardable",
    ),
    Touch(
        "upstream/megatron_distributed_optimizer.py",
        f"{DISTRIBUTED}._set_main_param_and_optimizer_states",
        "(self, model_param, tensors)",
        CLASS + "_set_main_param_and_optimizer_states",
    ),
    Touch(
        "upstream/megatron_optimizer.py",
        "megatron.training.training:train",
        "source: config.grad_scale_func = optimizer.scale_loss",
        "__self__",
    ),
    Touch(
        "upstream/megatron_rope.py",
        "megatron.core.transformer.attention:Attention",
        "source: mscale=self._yarn_concentration_factor",
        "_yarn_concentration_factor",
    ),
    Touch(
        "upstream/megatron_saving.py",
        "megatron.training.checkpointing:save_checkpoint",
        "(iteration, model, optimizer, opt_param_scheduler, "
        "num_floating_point_operations_so_far, checkpointing_context=, pipeline_rank=, "
        "expert_rank=, tensor_rank=, pipeline_parallel=, expert_parallel=, "
        "non_persistent_ckpt=, train_data_iterator=, preprocess_common_state_dict_fn=, "
        "release=, tp_group=, pp_group=, dp_cp_group=, dp_group=, expt_dp_group=, "
        "rng_state_key_prefix=)",
        "megatron.training.training.save_checkpoint",
    ),
    Touch(
        "upstream/megatron_saving.py",
        "megatron.training.checkpointing:load_checkpoint",
        "(ddp_model, optimizer, opt_param_scheduler, load_arg=, strict=, "
        "checkpointing_context=, skip_load_to_model_and_opt=, tp_group=, pp_group=, "
        "dp_cp_group=, dp_group=, expt_dp_group=, rng_state_key_prefix=)",
        "megatron.training.training.load_checkpoint",
    ),
    Touch(
        "upstream/megatron_saving.py",
        "megatron.training.async_utils:maybe_finalize_async_save",
        "(blocking=, terminate=)",
        "megatron.training.training.maybe_finalize_async_save",
    ),
    Touch(
        "upstream/megatron_saving.py",
        "megatron.training.async_utils:schedule_async_save",
        "(async_request)",
        "megatron.training.checkpointing.schedule_async_save",
    ),
    Touch(
        "upstream/megatron_saving.py",
        "megatron.training.wandb_utils:on_save_checkpoint_success",
        "(checkpoint_path, tracker_filename, save_dir, iteration)",
    ),
    Touch(
        "upstream/megatron_saving.py",
        f"{WRITER}:FileSystemWriterAsync.write_preloaded_data",
        "(transform_list, local_proc_idx, write_bucket, results_queue, count_queue, use_fsync, **kwargs)",
    ),
    Touch("upstream/megatron_saving.py", f"{WRITER}:get_write_results_queue", "(mp_mode=)"),
    Touch("upstream/megatron_saving.py", f"{WRITER}:_results_queue", BOUND),
    Touch(
        "upstream/modelopt_distillation.py",
        "modelopt.torch.distill.plugins.megatron:adjust_distillation_model_for_mcore",
        "source: self._lm_loss_call_count = 0",
        "_lm_loss_call_count",
    ),
    Touch("upstream/modelopt_distillation.py", "torch.nn.modules.loss:_Loss", "fields: reduction"),
    Touch("upstream/torch_checkpoint.py", "torch._C:PyTorchFileReader.get_all_records", "(self)", "torch._C"),
    Touch(
        "upstream/torch_checkpoint.py",
        "torch.distributed.checkpoint.filesystem:_StorageInfo",
        "fields: relative_path, offset, length, transform_descriptors",
    ),
    Touch(
        "upstream/torch_checkpoint.py",
        "torch.distributed.checkpoint.utils:_create_file_view",
        "(file, offset, length)",
    ),
    Touch("upstream/torch_checkpoint.py", "torch.serialization:_get_layout", BOUND),
    Touch("upstream/torch_checkpoint.py", "torch.serialization:_get_layout", BOUND, "_get_layout"),
    Touch(
        "upstream/torch_checkpoint.py",
        "torch._utils:_rebuild_tensor_v2",
        "(storage, storage_offset, size, stride, requires_grad, backward_hooks, metadata=)",
        "_rebuild_tensor_v2",
    ),
    Touch(
        "upstream/torch_checkpoint.py",
        "torch._utils:_rebuild_parameter",
        "(data, requires_grad, backward_hooks)",
        "_rebuild_parameter",
    ),
    Touch(
        "upstream/torch_flash_attention.py",
        "torch.ops:aten._flash_attention_forward",
        "(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, "
        "return_debug_mask, scale, window_size_left, window_size_right, seqused_k, "
        "alibi_slopes, block_table, num_splits)",
    ),
    Touch(
        "upstream/torch_flash_attention.py",
        "torch.ops:aten._flash_attention_backward",
        "(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, "
        "max_k, dropout_p, is_causal, rng_state, unused, scale, window_size_left, "
        "window_size_right)",
    ),
    Touch(
        "upstream/torch_flash_attention.py",
        "torch.ops:aten._scaled_dot_product_flash_attention_for_cpu",
        "(query, key, value, dropout_p, is_causal, attn_mask, scale)",
    ),
    Touch(
        "upstream/torch_flash_attention.py",
        "torch.ops:aten._scaled_dot_product_flash_attention_for_cpu_backward",
        "(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, attn_mask, scale)",
    ),
    Touch("upstream/torch_operators.py", "torch.storage:_StorageBase._cdata", BOUND, "_cdata"),
    Touch(
        "upstream/torch_operators.py",
        "torch.utils._python_dispatch:TorchDispatchMode.__torch_dispatch__",
        "(self, func, types, args=, kwargs=)",
        "torch.utils._python_dispatch.TorchDispatchMode",
    ),
    Touch("upstream/torch_operators.py", "torch.utils._pytree:tree_leaves", "(tree, is_leaf=)"),
    Touch(
        "upstream/transformers_models.py",
        "transformers.modeling_utils:PreTrainedModel._from_config",
        "(cls, config, **kwargs)",
        "_from_config",
    ),
    Touch(
        "hf/modeling_dms.py",
        "transformers.modeling_utils:PreTrainedModel._from_config",
        "(cls, config, **kwargs)",
        "_from_config",
    ),
    Touch(
        "hf/refusals_dms.py",
        "transformers.configuration_utils:PreTrainedConfig._attn_implementation",
        "source: self._attn_implementation",
        "_attn_implementation",
    ),
    Touch(
        "hf/modeling_dms.py",
        "transformers.generation.utils:GenerationMixin._prepare_cache_for_generation",
        "(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)",
        "_prepare_cache_for_generation",
    ),
    Touch(
        "inference/baselines/model.py",
        "transformers.generation.utils:GenerationMixin._prepare_cache_for_generation",
        "(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)",
        "_prepare_cache_for_generation",
    ),
    Touch(
        "hf/modeling_dms.py",
        "transformers.generation.utils:GenerationMixin._prepare_position_ids_for_generation",
        "(self, inputs_tensor, model_kwargs)",
        "_prepare_position_ids_for_generation",
    ),
    Touch(
        "hf/modeling_dms.py",
        "transformers.generation.utils:GenerationMixin._prepare_generated_length",
        "(self, generation_config, has_default_max_length, has_default_min_length, "
        "model_input_name, input_ids_length, inputs_tensor)",
        "_prepare_generated_length",
    ),
    Touch(
        "hf/modeling_dms.py",
        "transformers.generation.utils:GenerationMixin._get_stopping_criteria",
        "(self, generation_config, stopping_criteria, tokenizer=)",
        "_get_stopping_criteria",
    ),
    Touch("upstream/cpu.py", "torch.cuda:is_available", BOUND, "setattr torch.cuda"),
    Touch("upstream/cpu.py", "torch.cuda.random:get_rng_state", BOUND, "setattr torch.cuda.random"),
    Touch("upstream/cpu.py", "torch.accelerator:is_available", BOUND, "setattr torch.accelerator"),
]

# Signatures and behaviour that we rely on without touching a private name, and that are not documented.
RELIED_ON = [
    Touch("upstream/megatron_arguments.py", "megatron.training.arguments:validate_args", "(args, defaults=)"),
    Touch(
        "upstream/megatron_saving.py",
        f"{WRITER}:FileSystemWriterAsync.write_preloaded_data_multithread",
        "(transform_list, use_msc, rank, write_buckets, global_results_queue)",
    ),
    Touch(
        "upstream/megatron_saving.py",
        f"{WRITER}:FileSystemWriterAsync.get_save_function_and_args",
        "source: [torch.distributed.get_rank(), self.write_buckets, self.results_queue]",
    ),
    Touch(
        "resilience/verified_saves.py",
        "megatron.core.dist_checkpointing.strategies.async_utils:AsyncRequest",
        "fields: async_fn, async_fn_args, finalize_fns, async_fn_kwargs, preload_fn, is_frozen, call_idx",
    ),
    Touch(
        "upstream/modelopt_distillation.py",
        "modelopt.torch.distill.plugins.megatron:adjust_distillation_model_for_mcore",
        "(model, distill_cfg)",
    ),
    Touch(
        "upstream/modelopt_distillation.py",
        "modelopt.torch.distill.plugins.megatron:DistillationConfig",
        "fields: intermediate_layer_pairs, logit_layers, skip_lm_loss, kd_loss_scale, "
        "logit_kl_temperature, logit_kl_topk, criterion, loss_balancer",
    ),
    Touch(
        "upstream/modelopt_distillation.py",
        "modelopt.torch.distill.distillation_model:DistillationModel.only_student_forward",
        "(self, enable=)",
    ),
    Touch(
        "upstream/torch_checkpoint.py",
        "torch.distributed.checkpoint.filesystem:_FileSystemWriter.finish",
        "(self, metadata, results)",
    ),
    Touch("upstream/torch_checkpoint.py", "torch.serialization:skip_data", "fields: "),
    Touch(
        "upstream/transformers_chat.py",
        "transformers.utils.chat_template_utils:render_jinja_template",
        "(conversations, tools=, documents=, chat_template=, "
        "return_assistant_tokens_mask=, continue_final_message=, add_generation_prompt=, "
        "**kwargs)",
    ),
    Touch(
        "hf/modeling_dms.py",
        "transformers.models.llama.modeling_llama:LlamaModel.forward",
        "(self, input_ids=, attention_mask=, position_ids=, cache=, inputs_embeds=, use_cache=, **kwargs)",
    ),
    Touch(
        "hf/attention_dms.py",
        "transformers.models.llama.modeling_llama:LlamaDecoderLayer.forward",
        "source: cache=cache,\n            use_cache=use_cache,",
    ),
    Touch(
        "resilience/hang_diagnosis.py",
        "torch.distributed.distributed_c10d:all_reduce",
        "(tensor, op=, group=, async_op=)",
    ),
    Touch(
        "resilience/hang_diagnosis.py",
        "megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate",
        "(self, *, tensor_send_next, tensor_send_prev, recv_prev, recv_next, tensor_shape, wait_on_reqs=)",
    ),
    Touch(
        "resilience/collective_steps.py",
        "torch.distributed.checkpoint.api:CheckpointException.failures",
        "(self)",
    ),
    Touch(
        "resilience/collective_steps.py",
        f"{WRITER}:",
        "source: An error is caught while starting worker {i}, error: {e}",
    ),
    Touch(
        "formats/torch_dist.py",
        "torch.distributed.checkpoint.planner_helpers:create_read_items_for_chunk_list",
        "(fqn, checkpoint_md, local_chunks)",
    ),
    Touch(
        "formats/torch_dist.py",
        "torch.distributed.checkpoint.default_planner:create_default_global_save_plan",
        "(all_plans, rewrite_index_hints=)",
    ),
    Touch(
        "training/step.py",
        "megatron.core.pipeline_parallel.schedules:forward_step_calc_loss",
        "source: output_tensor *= cp_group_size\n                output_tensor /= num_microbatches",
    ),
    Touch("training/step.py", "megatron.training.training:train", "source: args.curr_iteration = iteration"),
    Touch(
        "training/layout.py",
        "megatron.core.pipeline_parallel.schedules:get_schedule_table",
        "(num_microbatches, num_model_chunks, microbatch_group_size_per_vp_stage)",
    ),
    Touch(
        "training/fused_output.py",
        "megatron.core.models.gpt.gpt_model:GPTModel._postprocess",
        "source: return output_processor(\n                hidden_states=hidden_states,",
    ),
    Touch(
        "training/run_log.py",
        "megatron.training.global_vars:_set_wandb_writer",
        "source: wandb.init(**wandb_kwargs)",
    ),
    Touch(
        "data/dataset.py",
        "megatron.training.datasets.data_samplers:MegatronPretrainingSampler",
        "source: start_idx = self.data_parallel_rank * self.micro_batch_size",
    ),
    Touch(
        "data/dataset.py",
        "megatron.training.training:train",
        'source: getattr(build_train_valid_test_datasets_provider, "is_distributed", False)',
    ),
    Touch(
        "mcore/context_parallel.py",
        "megatron.core.utils:get_batch_on_this_cp_rank",
        "(batch, is_hybrid_cp, cp_group=, hybrid_cp_group_func=, use_per_sequence_balancing=)",
    ),
    *(
        Touch("upstream/cpu.py", f"torch.cuda:{name}", BOUND)
        for name in cpu.cuda_answers()
        if not name.endswith("Tensor")  # torch makes these types in C++
    ),
]
