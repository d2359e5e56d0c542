"""Which DeepSpeed settings a recipe may add, and why the others may not be given there.

DeepSpeed accepts misspelt keys in silence in most places, so nothing passes that is not listed here.
"""

from typing import Any

from penstock.errors import nearest

# Sections that may be extended, and the keys that are sound with the rest of the engine.
ALLOWED: dict[str, set[str]] = {
    "zero_optimization": {
        "overlap_comm",
        "reduce_bucket_size",
        "allgather_bucket_size",
        "contiguous_gradients",
        "reduce_scatter",
        "round_robin_gradients",
        "sub_group_size",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
    },
    "flops_profiler": {"enabled", "profile_step", "module_depth", "top_modules", "detailed", "output_file"},
    "comms_logger": {"enabled", "verbose", "prof_all", "debug", "prof_ops"},
    "": {
        "communication_data_type",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "seq_parallel_communication_data_type",
    },
}

# Settings with a home elsewhere in the recipe, or known to go wrong.
REFUSED = {
    "train_batch_size": "set data.batch",
    "train_micro_batch_size_per_gpu": "it follows from data.batch, the ranks and engine.accumulation",
    "gradient_accumulation_steps": "set engine.accumulation",
    "gradient_clipping": "set engine.clip",
    "optimizer": "set optim",
    "scheduler": "set optim.schedule; a scheduler inside DeepSpeed is stepped wrongly and lost on load",
    "fp16": "set engine.precision",
    "bf16": "set engine.precision",
    "torch_autocast": "set engine.precision",
    "amp": "set engine.precision",
    "data_types": "fp32 accumulation is the default here",
    "activation_checkpointing": "set engine.checkpointing",
    "checkpoint": "set checkpoint; DeepSpeed's own checkpoints are not used",
    "zero_allow_untested_optimizer": "it is set, with our own check of the optimizer",
    "zero_optimization.stage": "set engine.zero",
    "zero_optimization.elastic_checkpoint": "checkpoints are elastic at every stage already",
    "zero_optimization.offload_optimizer": "offloading is not supported yet",
    "zero_optimization.offload_param": "offloading is not supported yet",
    "tensorboard": "runs are tracked in MLflow; set tracking",
    "wandb": "runs are tracked in MLflow; set tracking",
}


def check_extra(extra: dict[str, Any]) -> None:
    """Raise ValueError naming every key of `extra` that may not be given, with what to do instead."""
    wrong = []
    known = (
        set(REFUSED)
        | ALLOWED[""]
        | {f"{section}.{key}" for section, keys in ALLOWED.items() if section for key in keys}
    )
    for key, value in extra.items():
        inner = value if key in ALLOWED and isinstance(value, dict) else None
        for name in [f"{key}.{part}" for part in inner] if inner is not None else [key]:
            section, _, leaf = name.rpartition(".")
            if leaf in ALLOWED.get(section, set()):
                continue
            reason = (
                f"; {REFUSED[name]}"
                if name in REFUSED
                else nearest(name, known) or "; it is not a setting known to be sound"
            )
            wrong.append(f"{name}{reason}")
    if wrong:
        raise ValueError("; ".join(wrong) if len(wrong) == 1 else "\n".join(wrong))
