"""The sections of a run's configuration: each field with its default, its meaning and its unit."""

from __future__ import annotations

from dataclasses import dataclass, fields

from kvds.config.alignment_modes import ALIGNMENT_MODES, modes_where
from kvds.config.selection_methods import SELECTION_METHODS, default_observers
from kvds.config.setting_field import SHARE_BELOW_ONE, setting
from kvds.config.values import DATA_FORMATS


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Teacher and student."""

    model_name: str | None = setting(
        "folder or hub name of teacher and student both", None, form="model", may_change=True, common=True
    )
    teacher_name: str | None = setting(
        "folder or hub name of the teacher", None, form="model", may_change=True, common=True
    )
    teacher_names: tuple[str, ...] = setting(
        "several teachers of one tokenizer, in place of teacher_name", (), form="model"
    )
    teacher_weights: tuple[float, ...] = setting("factor of each one's KV loss; unset: the same, 1 in sum", ())
    student_name: str | None = setting(
        "folder or hub name of the student", None, form="model", may_change=True, common=True
    )
    teacher_init: str = setting("weights of the teacher", "pretrained", choices=("pretrained", "random"))
    student_init: str = setting("weights of the student", "pretrained", choices=("pretrained", "random"), common=True)
    teacher_config_overrides: str = setting(
        "changes of the teacher's config.json: key=value,key=value", "", form="overrides"
    )
    student_config_overrides: str = setting(
        "changes of the student's config.json: key=value,key=value", "", form="overrides"
    )
    tokenizer_name: str | None = setting(
        "folder or hub name; unset: the teacher's, else the student's", None, form="model", may_change=True
    )
    attn_implementation: str = setting("attention of transformers", "sdpa", choices=("sdpa", "eager"))
    compile: str = setting(
        "torch.compile of what stands around attention in the layers of teacher and student: faster steps after a "
        "first one of up to a minute; auto: on a GPU, where the models fit", "auto", choices=("auto", "on", "off"),
        may_change=True,
    )  # fmt: skip
    tf32: bool = setting("fp32 on a GPU: matrix products in TF32, several times faster, of 10 bits of mantissa", False)
    gradient_checkpointing: bool = setting("recompute the student's layers in the backward pass", False)
    checkpoint_offload: bool = setting("gradient_checkpointing: keep the layers' inputs in host memory", False)
    teacher_cache: str | None = setting(
        "folder written by `kvds cache`, read instead of running the teacher", None, may_change=True
    )
    teacher_placement: str = setting(
        "whole on each rank, sharded by ZeRO-3, sharded and offloaded to host memory, or its heads dealt out to "
        "teacher_tp_size ranks", "replicated",
        choices=("replicated", "zero3", "zero3_offload", "tensor_parallel"), may_change=True,
    )  # fmt: skip
    teacher_tp_size: int = setting(
        "tensor_parallel: ranks that share one teacher, best of one node", 2, may_change=True
    )
    teacher_overlap: bool = setting(
        "run a replicated teacher one micro-batch ahead, on a GPU on a stream of its own beside the student's backward "
        "pass; the same losses, and one more micro-batch of the teacher's keys and values in memory", False,
        may_change=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Rows to learn from and to judge by."""

    datasets: tuple[str, ...] = setting(
        "gsm8k svamp strategyqa arc_easy arc_challenge synthetic, OWNER/NAME of the hub (/CONFIG, @TRAIN,EVAL behind), "
        "a file (.jsonl .json .parquet .csv) or folder; each with :WEIGHT", ("synthetic",), common=True,
    )  # fmt: skip
    columns: tuple[str, ...] = setting(
        "your own data's columns: prompt=instruction+input,answer=output; one for all or for each of datasets (auto)",
        (),
    )
    data_format: str = setting("of your own rows; auto: by their columns", "auto", choices=DATA_FORMATS)
    chat_template: str | None = setting("file with a Jinja template; unset: the tokenizer's", None, may_change=True)
    assistant_turns: str = setting("turns of a chat that are learned", "all", choices=("all", "last"))
    streaming: bool = setting("read your own data row by row, stored nowhere, until subset_size are taken", False)
    data_dir: str | None = setting(
        "folder with the publishers' files; unset: hub names through `datasets`", None, may_change=True, identity=False,
        common=True,
    )  # fmt: skip
    data_cache: str | None = setting(
        "folder for rows as tokens, which later runs read; never: keep none; unset: kvds below HF_DATASETS_CACHE", None,
        may_change=True, identity=False,
    )  # fmt: skip
    subset_size: int | None = setting("training rows in all; unset: every row", None, least=1)
    max_length: int = setting(
        "tokens per row; longer rows are left out and counted", 512, least=2, common=True,
        expected="at least 2 tokens, one to read and one to predict",
    )  # fmt: skip
    packing: bool = setting("samples of a micro-batch share rows of max_length tokens; off: a padded row each", False)
    group_by_length: bool = setting("samples of a step are of like length, so that less is padding", False)
    pad_to_multiple_of: int = setting(
        "rows of a batch are as long as a multiple of this, at most max_length: a GPU meets fewer shapes, each of "
        "which costs up to seconds the first time", 1, may_change=True,
    )  # fmt: skip
    on_bad_row: str = setting("what a malformed row does", "error", choices=("error", "skip"), identity=False)
    max_lossy_rows: float = setting(
        "share of rows that may lose characters which the tokenizer does not know, from 0 to 1; more are refused", 0.05,
        least=0, most=1, expected="a share from 0 to 1", may_change=True, identity=False,
    )  # fmt: skip
    eval_subset_size: int = setting("held-out rows per corpus; 0: no evaluation", 200, least=0, may_change=True)
    max_new_tokens: int = setting("tokens generated per held-out row", 256, least=1, may_change=True)
    # Far more distinct problems would be searched for without end.
    synthetic_problems: int = setting("training problems of the built-in corpus", 1000, least=1, most=10**6)


@dataclass(frozen=True, kw_only=True)
class AlignmentSettings:
    """How keys and values are matched."""

    alignment_mode: str = setting(
        "how student and teacher KV meet; "
        + "; ".join(f"{name}: {mode.doc}" for name, mode in ALIGNMENT_MODES.items()),
        "structured",
        choices=ALIGNMENT_MODES.keys(),
        common=True,
    )
    map_proj_share_dim: bool = setting(
        "structured: one dimension map for all layers and heads; hidden: for all layers", False
    )
    map_proj_init_uniform: bool = setting("structured: mixing weights start uniform, not near the diagonal", False)
    layer_map: str | None = setting(
        f"which layers are matched; unset: endpoint for {modes_where(lambda mode: mode.layer_map == 'endpoint')}, else "
        "learned", None,
        choices=("learned", "endpoint", "last_aligned"),
    )  # fmt: skip
    source_layers_per_target: int = setting(
        "flat: layers of the source, those nearest in depth, that each target layer's map takes side by side", 1,
        least=1,
    )  # fmt: skip
    direction: str = setting(
        "which side the map moves", "student_to_teacher", choices=("student_to_teacher", "teacher_to_student")
    )
    aligner_update: str = setting("whether the map learns", "trained", choices=("trained", "frozen"))
    map_start: str = setting(
        "start of the dimension maps; auto: ridge for a pretrained student where there are maps, else random", "auto",
        choices=("auto", "random", "pca", "procrustes", "ridge"),
    )  # fmt: skip
    calibration_batches: int = setting(
        "steps of batches that statistics and closed-form starts are fitted on", 4, least=1
    )
    align_tokens: str = setting(
        "what corresponds in teacher and student: token positions, or reasoning steps (means over the tokens of each; "
        "rows may then hold a teacher_rationale of another length)",
        "position",
        choices=("position", "segment"),
    )
    kv_method: str = setting(
        "positions that count; " + "; ".join(f"{name}: {method.doc}" for name, method in SELECTION_METHODS.items()),
        "full",
        choices=SELECTION_METHODS.keys(), common=True
    )  # fmt: skip
    kv_budget: int | float | None = setting("positions per row: a count, or a fraction in (0, 1]", None)
    rkv_lambda: float = setting(
        "rkv, rkv_window: weight of importance against redundancy, from 0 to 1",
        0.1,
        least=0,
        most=1,
        expected="a weight from 0 to 1",
    )
    observing_tokens: int | None = setting(
        f"tokens per row whose queries say what is important; unset: {default_observers()}", None, least=1,
    )  # fmt: skip
    teacher_kv: str = setting(
        "teacher's keys and values of the row itself, or as a control of another row of the batch", "matched",
        choices=("matched", "shuffled"),
    )  # fmt: skip
    kv_parts: str = setting(
        f"keys and values, or one of them; auto: values alone for {modes_where(lambda mode: mode.parts == 'v')}, else "
        "both", "auto",
        choices=("auto", "kv", "k", "v"),
    )  # fmt: skip
    value_metric: str = setting(
        "flat, structured: a residual of values counts as it is, or as much as it moves the output of the teacher's "
        "attention", "states", choices=("states", "output"),
    )  # fmt: skip
    token_weights: str = setting(
        "flat, structured: positions count alike, or each as much as the attention that the teacher pays to it",
        "equal", choices=("equal", "attention"),
    )  # fmt: skip
    kv_loss: str = setting("penalty of a standardised residual", "mse", choices=("mse", "l1", "smooth_l1"))
    hidden_at: str = setting(
        "hidden: the outputs of whole decoder layers, or of their attention, after its output projection", "layer",
        choices=("layer", "attention"),
    )  # fmt: skip
    relation_kind: str = setting(
        "relation: scaled dot products under a softmax, compared by KL, or cosines, compared by kv_loss", "softmax",
        choices=("softmax", "cosine"),
    )  # fmt: skip
    relation_heads: int | None = setting(
        "relation: pieces that the heads of a layer are cut into; unset: greatest common divisor of the head counts",
        None,
        least=1,
    )
    relation_units: str = setting(
        "relation: states in units of their start, mean taken out, or raw as in the paper", "standard",
        choices=("standard", "raw"),
    )  # fmt: skip
    attention_loss_weight: float = setting(
        "structural_kv: weight of the attention's KL divergence beside the cosines; 0: without", 1.0, least=0
    )
    kv_weight: str | float = setting(
        "weight of the KV loss: a number; or auto:SHARE of the task's gradient at the start, for a fitted map of the "
        "task's loss at most; or hold:SHARE, moved so that its gradient at keys and values stays SHARE times all else "
        "that arrives there; or balance:SHARE, at each step so that it counts SHARE times all other losses", "auto:2.0",
        common=True,
    )  # fmt: skip
    kv_weight_schedule: str = setting(
        "weight until kv_weight_until: kept, or falling to 0", "constant", choices=("constant", "linear")
    )
    kv_weight_until: float = setting(
        "share of the steps after which the weight is 0; 1: to the end", 1.0, above=0, most=1,
        expected="a share above 0, at most 1",
    )  # fmt: skip
    kv_let_go: bool = setting(
        "give up a KV loss whose weight is no number where its gradient turns against the task's, or vanishes at the "
        "start", True,
    )  # fmt: skip
    kv_rope: str = setting("keys before or after rotary embedding", "pre", choices=("pre", "post"))
    mask_first_token: bool = setting("leave out the first token, an attention sink", True)
    layer_groups: int = setting("structured: groups of layers that draw only from each other", 1, least=1)
    head_groups: int = setting("structured: groups of KV heads that draw only from each other", 1, least=1)
    impl: str = setting(
        "structured: implementation of the projection; auto: triton on a GPU, lean elsewhere", "auto",
        choices=("auto", "reference", "lean", "compile", "triton"), may_change=True,
    )  # fmt: skip
    task_weight: float = setting("weight of the task cross entropy", 1.0, least=0)
    logit_kd_weight: float = setting("weight of logit distillation", 0.0, least=0)
    handoff_weight: float = setting("weight of answers written from the teacher's mapped keys and values", 0.0, least=0)
    handoff_source_layers: int | None = setting(
        "handoff_weight: teacher layers for each of the student's", None, least=1
    )
    logit_kd_temperature: float = setting(
        "temperature of logit distillation", 1.0, above=0, expected="a number above 0, such as 5e-5"
    )
    logit_kd_loss: str = setting(
        "divergence from the teacher's distribution over tokens: forward_kl covers all that the teacher finds likely, "
        "reverse_kl stays where the teacher is, jsd (generalised Jensen-Shannon) lies between", "forward_kl",
        choices=("forward_kl", "reverse_kl", "jsd"),
    )  # fmt: skip
    logit_kd_beta: float = setting(
        "jsd: weight of the teacher in the mixture that both are compared with", 0.5, above=0, below=1,
        expected="a number between 0 and 1",
    )  # fmt: skip
    logit_kd_top_k: int = setting(
        "the teacher's likeliest tokens that count each by itself, all others as one; 0: every token", 0, least=0
    )

    @property
    def chosen_map_start(self) -> str:
        """``map_start``, for ``auto`` what it stands for; without a run nothing is known of a student."""
        return "random" if self.map_start == "auto" else self.map_start

    @property
    def teacher_reads(self) -> str:
        """What is compared of the teacher, as :func:`kvds.kv.open_capture` takes it."""
        of_mode = ALIGNMENT_MODES[self.alignment_mode].teacher_reads
        return "attention_output" if self.hidden_at == "attention" else of_mode

    def alignment(self) -> AlignmentSettings:
        """This section alone, of whatever holds it with others."""
        return AlignmentSettings(**{one.name: getattr(self, one.name) for one in fields(AlignmentSettings)})


@dataclass(frozen=True, kw_only=True)
class OptimizationSettings:
    """Batches, steps, learning rate."""

    # Their product with the number of ranks may not change: the checkpoint knows it.
    batch_size: int = setting("rows per device and micro-batch", 8, least=1, may_change=True, common=True)
    tokens_per_batch: int | None = setting(
        "the rows of a step in as few micro-batches as fit: all samples of one in a row of at most so many tokens, "
        "without padding between them; 0: batch_size padded rows each; unset: what `kvds plan` finds room for on a "
        "GPU, at most 40960, and 0 on a CPU and for settings that need rows of their own", None, least=0,
        may_change=True,
    )  # fmt: skip
    gradient_accumulation_steps: int = setting("micro-batches per optimizer step", 1, least=1, may_change=True)
    epochs: int = setting("passes over the training rows", 3, least=1, common=True)
    max_steps: int | None = setting("optimizer steps; overrides epochs", None, least=1, common=True)
    lr: float = setting("peak learning rate", 5e-5, above=0, expected="a number above 0, such as 5e-5", common=True)
    aligner_lr: float | None = setting(
        "peak learning rate of the map; unset: lr", None, above=0, expected="a number above 0, such as 5e-5"
    )
    weight_decay: float = setting("AdamW's, on matrices of the student", 0.0, least=0)
    optimizer: str = setting("optimizer", "adamw", choices=("adamw", "sgd"))
    lr_scheduler_type: str = setting("schedule after warm-up", "linear", choices=("linear", "cosine", "constant"))
    warmup_ratio: float = setting(
        "share of the steps in which the learning rate rises", 0.0, least=0, below=1, expected=SHARE_BELOW_ONE,
    )  # fmt: skip
    max_grad_norm: float | None = setting(
        "clip the gradient to this norm, 0: never; unset: the DeepSpeed configuration's",
        None,
        least=0,
        expected="at least 0 (0: never clip)",
    )
    # Random states are numbers of 64 bits made of seed, step and rank.
    seed: int = setting("of data order, random weights and dropout", 0, least=0, most=2**31 - 1, common=True)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where the run lives and what it records."""

    output_dir: str = setting("folder of the run (required)", may_change=True, identity=False, common=True)
    deepspeed_config: str = setting(
        "DeepSpeed configuration: a file, or the name of one of ds_configs/",
        "ds_configs/zero3.json",
        may_change=True,
        common=True,
    )
    logging_steps: int = setting("steps between logged metrics", 10, least=1, may_change=True)
    save_steps: int = setting(
        "steps between checkpoints; 0: only at the end", 500, least=0, may_change=True, identity=False
    )
    save_at_end: bool = setting(
        "a checkpoint after the last step, from which a longer run can go on", True, may_change=True, identity=False
    )
    eval_steps: int = setting("steps between evaluations; 0: only at the end", 0, least=0, may_change=True)
    resume: str = setting(
        "auto: go on from the output folder's last checkpoint; never; or that folder",
        "auto",
        may_change=True,
        identity=False,
        common=True,
    )
    change_global_batch: bool = setting(
        "resume with another number of rows per optimizer step; otherwise --gradient_accumulation_steps makes up for "
        "another number of ranks", False, may_change=True,
    )  # fmt: skip
    keep_checkpoints: int = setting(
        "newest checkpoints that stay on the disk; 0: all", 0, least=0, may_change=True, identity=False
    )
    max_minutes: float | None = setting(
        "minutes after its start at which the run saves a checkpoint and ends with exit code 85; unset: never",
        None,
        above=0,
        may_change=True,
        identity=False,
    )
    deterministic: bool = setting(
        "sum in one order, so that the same run gives the same bits on a GPU as it does on a CPU anyway; by kernels of "
        "attention and others that are slower", False, may_change=True,
    )  # fmt: skip
    max_bad_steps: int = setting(
        "steps in a row with a loss or gradient that is not finite before the run stops", 10, least=1, may_change=True
    )
    rank_timeout: int = setting(
        "seconds without a sign of life from one rank after which the others end", 120, least=5,
        expected="at least 5 seconds", may_change=True, identity=False,
    )  # fmt: skip
    report_to: tuple[str, ...] = setting(
        "trackers beside metrics.jsonl, each through its own library", ("mlflow",),
        choices=("mlflow", "tensorboard", "wandb", "none"), may_change=True, identity=False, common=True,
    )  # fmt: skip
    tracking_uri: str | None = setting(
        "MLflow tracking URI; unset: sqlite in the output folder", None, may_change=True, identity=False
    )
    experiment_name: str = setting("experiment of MLflow, project of wandb", "kvds", may_change=True, identity=False)
    run_name: str | None = setting(
        "name of the run in MLflow and wandb; unset: the output folder's", None, may_change=True, identity=False
    )
    dry_run: bool = setting(
        "do everything but train: read the data, build the models without weights, check files, space and memory",
        False,
        may_change=True,
        common=True,
    )
