"""Flags, recipes and DeepSpeed files that must be refused, each with what the one line must hold: place and
value first, then expectation or remedy.

``tests/hostile/test_bad_input.py`` runs them all; none needs a model.
"""

# fmt: off
# Flags beside those of a good run, given to launch/distill.py.
FLAGS = {
    "--batch_sizes 4": ("unknown flag --batch_sizes", "batch_size", "--help"),
    "--batch 4": ("unknown flag --batch", "--help"),
    "--kv_budgett=3": ("unknown flag --kv_budgett", "did you mean --kv_budget?"),
    "stray": ("unexpected argument stray", "--flag value"),
    "--lr": ("--lr", "expected one argument", "--help"),
    "--batch_size 0": ("batch_size=0", "at least 1", "--batch_size 8"),
    "--batch_size 2.5": ("batch_size=2.5", "a whole number", "--batch_size 8"),
    "--batch_size four": ("batch_size=four", "a whole number", "--batch_size 8"),
    "--batch_size none": ("batch_size=none", "a whole number", "--batch_size 8"),
    "--gradient_accumulation_steps -1": ("gradient_accumulation_steps=-1", "at least 1", "steps 1"),
    "--epochs 0": ("epochs=0", "at least 1", "--epochs 3"),
    "--max_steps 0": ("max_steps=0", "at least 1", "leave --max_steps away"),
    "--lr 0": ("lr=0", "above 0", "--lr 5e-05"),
    "--lr nan": ("lr=nan", "a finite number", "--lr 5e-05"),
    "--lr inf": ("lr=inf", "a finite number", "--lr 5e-05"),
    "--aligner_lr -0.1": ("aligner_lr=-0.1", "above 0", "--aligner_lr none"),
    "--weight_decay -1": ("weight_decay=-1", "at least 0", "--weight_decay 0.0"),
    "--warmup_ratio 1": ("warmup_ratio=1", "below 1", "--warmup_ratio 0.0"),
    "--max_grad_norm -1": ("max_grad_norm=-1", "at least 0", "0: never clip"),
    "--seed -3": ("seed=-3", "at least 0", "--seed 0"),
    "--optimizer adam": ("optimizer=adam", "adamw", "sgd", "did you mean adamw"),
    "--alignment_mode structure": ("alignment_mode=structure", "structured", "did you mean structured"),
    "--direction student_to_student": ("direction=student_to_student", "student_to_teacher"),
    "--layer_map first": ("layer_map=first", "learned, endpoint, last_aligned", "--layer_map none"),
    "--kv_method r_kv": ("kv_method=r_kv", "full, right_crop", "did you mean rkv", "--kv_method full"),
    "--kv_method rkv": ("kv_budget=none", "a number of tokens or a fraction", "rkv"),
    "--kv_method snapkv --kv_budget 8": ("kv_budget=8", "more tokens than the 8 observing", "--observing_tokens"),
    "--kv_method rkv_window --kv_budget 3 --observing_tokens 3":
        ("kv_budget=3", "more tokens than the 3 observing", "--observing_tokens"),
    "--observing_tokens 0": ("observing_tokens=0", "at least 1", "leave --observing_tokens away"),
    "--max_lossy_rows 1.5": ("max_lossy_rows=1.5", "a share from 0 to 1", "--max_lossy_rows 0.05"),
    "--max_lossy_rows some": ("max_lossy_rows=some", "a number", "--max_lossy_rows 0.05"),
    "--rkv_lambda 1.5": ("rkv_lambda=1.5", "from 0 to 1", "--rkv_lambda 0.1"),
    "--rkv_lambda -0.1": ("rkv_lambda=-0.1", "from 0 to 1", "--rkv_lambda 0.1"),
    "--kv_method right_crop": ("kv_budget=none", "a number of tokens or a fraction", "right_crop"),
    "--kv_method right_crop --kv_budget 0": ("kv_budget=0", "at least 1 token", "--kv_method full"),
    "--kv_method right_crop --kv_budget 1.5": ("kv_budget=1.5", "(0, 1]", "whole number of tokens"),
    "--kv_method right_crop --kv_budget -0.5": ("kv_budget=-0.5", "(0, 1]"),
    "--kv_budget 64": ("kv_budget=64", "no budget with --kv_method full", "--kv_method right_crop"),
    "--kv_weight auto": ("kv_weight=auto", "auto:SHARE", "auto:2.0"),
    "--kv_weight auto:0": ("kv_weight=auto:0", "auto:SHARE", "auto:2.0"),
    "--kv_weight auto:nan": ("kv_weight=auto:nan", "auto:SHARE", "auto:2.0"),
    "--teacher_names a b --teacher_name c": ("teacher_name=c", "one of --teacher_name, --teacher_names"),
    "--teacher_names a b --teacher_weights 1": ("teacher_weights=1", "one weight for each of the 2 teachers"),
    "--teacher_names a b --teacher_weights 1 0": ("teacher_weights=0", "numbers above 0", "--teacher_weights 0.5"),
    "--teacher_names a b --teacher_weights 1 much": ("teacher_weights=1 much", "numbers"),
    "--teacher_weights 1 2": ("teacher_weights=given", "several teachers to weigh", "--teacher_names A B"),
    "--teacher_names a b --logit_kd_weight 1": ("logit_kd_weight=1", "one teacher", "--teacher_name"),
    "--teacher_names a b --alignment_mode none": ("teacher_names=a b", "one teacher", "--teacher_name"),
    "--teacher_names a ./nowhere": ("teacher_names=./nowhere", "existing folder", "hub name"),
    "--kv_weight hold": ("kv_weight=hold", "hold:SHARE", "auto:2.0"),
    "--kv_weight hold:0": ("kv_weight=hold:0", "hold:SHARE", "auto:2.0"),
    "--kv_weight hold:nan": ("kv_weight=hold:nan", "hold:SHARE", "auto:2.0"),
    "--kv_weight hold:0.5 --kv_weight_schedule linear":
        ("kv_weight_schedule=linear", "constant with --kv_weight hold:SHARE"),
    "--kv_weight hold:0.5 --task_weight 0": ("kv_weight=hold:0.5", "a number", "--task_weight is 0"),
    "--kv_weight -1": ("kv_weight=-1", "at least 0", "auto:2.0"),
    "--kv_weight heavy": ("kv_weight=heavy", "at least 0", "auto:2.0"),
    "--teacher_kv random": ("teacher_kv=random", "matched, shuffled", "--teacher_kv matched"),
    "--teacher_kv shuffled --batch_size 1": ("teacher_kv=shuffled", "--batch_size above 1"),
    "--kv_parts vk": ("kv_parts=vk", "auto, kv, k, v", "kv"),
    "--calibration_batches 0": ("calibration_batches=0", "at least 1", "--calibration_batches 4"),
    "--map_start rigde": ("map_start=rigde", "auto, random", "did you mean ridge"),
    "--aligner_update frozen --student_init random": ("aligner_update=frozen", "--map_start pca"),
    "--aligner_update frozen --map_start random": ("aligner_update=frozen", "--map_start pca"),
    "--alignment_mode flat --head_groups 2": ("head_groups=2", "1 with --alignment_mode flat"),
    "--alignment_mode hidden --kv_parts v": ("kv_parts=v", "auto or kv with --alignment_mode hidden", "neither keys"),
    "--alignment_mode hidden --kv_rope post": ("kv_rope=post", "pre with --alignment_mode hidden", "not rotated"),
    "--alignment_mode hidden --kv_method rkv --kv_budget 8": ("kv_method=rkv", "random with --alignment_mode hidden"),
    "--alignment_mode hidden --layer_groups 2": ("layer_groups=2", "1 with --alignment_mode hidden"),
    "--alignment_mode relation --direction teacher_to_student":
        ("direction=teacher_to_student", "student_to_teacher with --alignment_mode relation", "nothing is mapped"),
    "--alignment_mode relation --aligner_update frozen": ("aligner_update=frozen", "trained with", "no map"),
    "--alignment_mode relation --map_start pca": ("map_start=pca", "random with", "no map"),
    "--alignment_mode relation --kv_loss l1": ("kv_loss=l1", "mse with --alignment_mode", "--relation_kind cosine"),
    "--alignment_mode relation --relation_heads 0": ("relation_heads=0", "at least 1", "leave --relation_heads away"),
    "--alignment_mode structural_kv --layer_map learned": ("layer_map=learned", "endpoint or last_aligned"),
    "--alignment_mode structural_kv --kv_parts k": ("kv_parts=k", "auto or kv with --alignment_mode structural_kv"),
    "--alignment_mode structural_kv --attention_loss_weight -1": ("attention_loss_weight=-1", "at least 0"),
    "--attention_loss_weight 2": ("attention_loss_weight=2", "1.0 with", "--alignment_mode structural_kv"),
    "--align_tokens segment --kv_method right_crop --kv_budget 4": ("kv_method=right_crop", "full with", "every step"),
    "--align_tokens segment --kv_rope post": ("kv_rope=post", "pre with --align_tokens segment", "mean"),
    "--align_tokens segment --alignment_mode structural_kv": ("align_tokens=segment", "position with", "attention"),
    "--align_tokens segments": ("align_tokens=segments", "position, segment", "did you mean segment"),
    "--relation_heads 2": ("relation_heads=2", "none with --alignment_mode structured", "--alignment_mode relation"),
    "--relation_kind cosine": ("relation_kind=cosine", "softmax with", "--alignment_mode relation"),
    "--relation_units raw": ("relation_units=raw", "standard with", "--alignment_mode relation"),
    "--relation_kind cos": ("relation_kind=cos", "softmax, cosine", "did you mean cosine"),
    "--task_weight 0 --alignment_mode none": ("task_weight=0", "some loss", "--task_weight 1"),
    "--task_weight 0": ("kv_weight=auto:2.0", "a number", "--task_weight is 0"),
    "--task_weight -1": ("task_weight=-1", "at least 0", "--task_weight 1.0"),
    "--logit_kd_temperature 0": ("logit_kd_temperature=0", "above 0", "temperature 1.0"),
    "--max_length 1": ("max_length=1", "at least 2", "--max_length 512"),
    "--subset_size 0": ("subset_size=0", "at least 1", "leave --subset_size away"),
    "--eval_subset_size -1": ("eval_subset_size=-1", "at least 0", "--eval_subset_size 200"),
    "--on_bad_row ignore": ("on_bad_row=ignore", "error, skip", "--on_bad_row error"),
    "--datasets": ("--datasets", "expected at least one argument", "--help"),
    "--datasets gsm8k:0": ("datasets=gsm8k:0", "weight above 0", "gsm8k:0.5"),
    "--datasets gsm8k:much": ("datasets=gsm8k:much", "weight above 0", "gsm8k:0.5"),
    "--datasets gsm8k:inf": ("datasets=gsm8k:inf", "weight above 0", "gsm8k:0.5"),
    "--datasets svamp gsm8k svamp:2": ("datasets=svamp", "each corpus once", "svamp:2"),
    "--datasets rows/missing.jsonl": ("datasets=rows/missing.jsonl", "an existing JSONL file", "prompt, rationale"),
    "--data_dir nowhere": ("data_dir=nowhere", "no such folder", "gsm8k/"),
    "--teacher_cache nowhere": ("teacher_cache=nowhere", "an existing folder written by `kvds cache`"),
    "--teacher_cache kvds --kv_method random --kv_budget 8":
        ("teacher_cache=kvds", "no --teacher_cache with", "random"),
    "--teacher_cache kvds --kv_method rkv --kv_budget 8": ("teacher_cache=kvds", "--kv_method rkv", "keys to choose"),
    "--teacher_cache kvds --teacher_names a b": ("teacher_cache=kvds", "no --teacher_cache with --teacher_names"),
    "--teacher_cache kvds --alignment_mode hidden": ("teacher_cache=kvds", "with --alignment_mode hidden"),
    "--teacher_cache kvds --align_tokens segment": ("teacher_cache=kvds", "with --align_tokens segment"),
    "--teacher_cache kvds --teacher_kv shuffled": ("teacher_cache=kvds", "with --teacher_kv shuffled", "whole rows"),
    "--teacher_cache kvds --logit_kd_weight 1": ("teacher_cache=kvds", "no --teacher_cache with --logit_kd_weight"),
    "--pad_to_multiple_of 0": ("pad_to_multiple_of=0", "1 (rows as long as the longest", "such as 64"),
    "--pad_to_multiple_of 513": ("pad_to_multiple_of=513", "to max_length=512"),
    "--packing --group_by_length": ("packing=true", "--no_packing with --group_by_length"),
    "--packing --kv_method rkv --kv_budget 8": ("packing=true", "--no_packing with --kv_method rkv", "of their own"),
    "--packing --alignment_mode relation": ("packing=true", "--no_packing with --alignment_mode relation"),
    "--packing --alignment_mode structural_kv": ("packing=true", "--no_packing with --alignment_mode structural_kv"),
    "--packing --teacher_kv shuffled": ("packing=true", "--no_packing with --teacher_kv shuffled"),
    "--compile yes": ("compile=yes", "auto, on, off", "--compile auto"),
    "--compile on --teacher_placement tensor_parallel": ("compile=on", "auto or off", "tensor_parallel"),
    "--tokens_per_batch -1": ("tokens_per_batch=-1", "at least 0", "leave --tokens_per_batch away"),
    "--tokens_per_batch 100 --max_length 128": ("tokens_per_batch=100", "at least max_length=128", "0 for padded rows"),
    "--tokens_per_batch 4096 --packing":
        ("tokens_per_batch=4096", "--tokens_per_batch 0 with --packing", "--no_packing"),
    "--tokens_per_batch 4096 --group_by_length":
        ("tokens_per_batch=4096", "--tokens_per_batch 0 with --group_by_length", "--no_group_by_length"),
    "--tokens_per_batch 4096 --attn_implementation eager":
        ("tokens_per_batch=4096", "--tokens_per_batch 0 with --attn_implementation eager", "sdpa"),
    "--tokens_per_batch 4096 --kv_method rkv --kv_budget 8":
        ("tokens_per_batch=4096", "--tokens_per_batch 0 with --kv_method rkv", "of their own"),
    "--tokens_per_batch 4096 --teacher_kv shuffled":
        ("tokens_per_batch=4096", "--tokens_per_batch 0 with --teacher_kv shuffled", "of their own"),
    "--packing --align_tokens segment": ("packing=true", "--no_packing with --align_tokens segment"),
    "--checkpoint_offload": ("checkpoint_offload=true", "--gradient_checkpointing", "--no_checkpoint_offload"),
    "--gradient_checkpointing maybe": ("--gradient_checkpointing maybe", "true or false", "--no_gradient"),
    "--no_gradient_checkpointing true": ("unexpected argument true", "--help"),
    "--teacher_placement zero2": ("teacher_placement=zero2", "replicated, zero3", "replicated"),
    "--teacher_placement tensor_parallel --teacher_tp_size 1": ("teacher_tp_size=1", "at least 2 ranks"),
    "--teacher_placement tensor_parallel --logit_kd_weight 1": (
        "teacher_placement=tensor_parallel",
        "replicated, zero3 or zero3_offload with --logit_kd_weight",
    ),
    "--teacher_placement tensor_parallel --kv_method rkv --kv_budget 8": (
        "teacher_placement=tensor_parallel",
        "with --kv_method rkv",
        "only keys and values are exchanged",
    ),
    "--teacher_placement tensor_parallel --alignment_mode hidden": (
        "teacher_placement=tensor_parallel",
        "with --alignment_mode hidden",
    ),
    "--teacher_overlap maybe": ("--teacher_overlap maybe", "true or false", "--no_teacher_overlap"),
    "--teacher_overlap --teacher_cache kvds":
        ("teacher_overlap=true", "--no_teacher_overlap with --teacher_cache", "no teacher runs"),
    "--teacher_overlap --teacher_names a b": ("teacher_overlap=true", "--no_teacher_overlap with --teacher_names"),
    **{f"--teacher_overlap --teacher_placement {placement}":
       ("teacher_overlap=true", f"with --teacher_placement {placement}: collectives", "--teacher_placement replicated")
       for placement in ("zero3", "zero3_offload", "tensor_parallel")},
    "--student_config_overrides n_layer": ("student_config_overrides=n_layer", "key=value", "num_hidden_layers=4"),
    "--teacher_config_overrides n_layer=1,n_layer=2":
        ("teacher_config_overrides=", "n_layer stands there twice", "once"),
    "--student_config_overrides =4": ("student_config_overrides==4", "key=value", "num_hidden_layers=4"),
    "--teacher_name ./nowhere": ("teacher_name=./nowhere", "existing folder", "hub name"),
    "--student_name a/b/c": ("student_name=a/b/c", "existing folder", "hub name"),
    "--tokenizer_name ../no/such": ("tokenizer_name=../no/such", "existing folder", "hub name"),
    "--resume outputs/nowhere": ("resume=outputs/nowhere", "auto, never or the folder", "--resume auto"),
    "--tracking_uri ./mlruns": ("tracking_uri=./mlruns", "sqlite:///FILE.db", "unset"),
    "--tracking_uri file:///tmp/x": ("tracking_uri=file:///tmp/x", "sqlite:///FILE.db", "unset"),
    "--report_to wandb": ("report_to=wandb", "mlflow, none", "--report_to mlflow"),
    "--logging_steps 0": ("logging_steps=0", "at least 1", "--logging_steps 10"),
    "--keep_checkpoints -1": ("keep_checkpoints=-1", "at least 0", "--keep_checkpoints 0"),
    "--keep_checkpoints few": ("keep_checkpoints=few", "a whole number", "--keep_checkpoints 0"),
    "--max_minutes 0": ("max_minutes=0", "above 0", "leave --max_minutes away"),
    "--max_minutes soon": ("max_minutes=soon", "a number", "--max_minutes none"),
    "--max_bad_steps 0": ("max_bad_steps=0", "at least 1", "--max_bad_steps 10"),
    "--rank_timeout 1": ("rank_timeout=1", "at least 5 seconds", "--rank_timeout 120"),
    "--rank_timeout 0.5": ("rank_timeout=0.5", "a whole number", "--rank_timeout 120"),
    "--save_steps -1": ("save_steps=-1", "at least 0", "--save_steps 500"),
    "--impl cuda": ("impl=cuda", "auto, reference, lean, compile, triton", "--impl auto"),
    "--deepspeed_config ds_configs/zero4.json": ("ds_configs/zero4.json", "No such file", "did you mean zero3?"),
    "--config nowhere.yaml": ("--config nowhere.yaml", "No such file", "kvds brings", "qwen2_reasoning"),
    "--output_dir pyproject.toml": ("output_dir=pyproject.toml", "is a file", "expected a folder"),
    "--seed 9999999999": ("seed=9999999999", "at most 2147483647", "--seed 0"),
    "--synthetic_problems 1000000000":
        ("synthetic_problems=1000000000", "at most 1000000", "--synthetic_problems 1000"),
    "--kv_weight 1e300": ("kv_weight=1e+300", "a finite number", "auto:2.0"),
    "--max_steps 1e3": ("max_steps=1000.0", "a whole number", "--max_steps none"),
    "--no_packing=true": ("--no_packing", "'true'", "--help"),
    "--lr -1e-5": ("--lr", "expected one argument", "--help"),
    "--eval_steps 1.0": ("eval_steps=1.0", "a whole number", "--eval_steps 0"),
    "--student_config_overrides a=": ("student_config_overrides=a=", "key=value", "num_hidden_layers=4"),
}

# All flags there are.
INCOMPLETE = {
    "": ("--output_dir is missing", "--output_dir outputs/NAME"),
    "--model_name gpt2": ("--output_dir is missing", "--output_dir outputs/NAME"),
    "--output_dir x": ("--teacher_name is missing", "--model_name"),
    "--output_dir x --alignment_mode none": ("--student_name is missing", "--model_name for both"),
    "--output_dir x --student_name gpt2": ("--teacher_name is missing", "--alignment_mode none"),
}

# The text of a recipe given by --config.
RECIPES: dict[str, tuple[str, ...]] = {
    "kv_budgett: 3": ("unknown key kv_budgett", "did you mean kv_budget", "--help"),
    "1: 2": ("unknown key 1", "--help"),
    "config: other.yaml": ("unknown key config", "--help"),
    "batch_size: '8'": ("batch_size=8", "a whole number", "--batch_size 8"),
    "batch_size: 8.0": ("batch_size=8.0", "a whole number", "--batch_size 8"),
    "batch_size: true": ("batch_size=true", "a whole number", "--batch_size 8"),
    "batch_size:": ("batch_size=none", "a whole number", "--batch_size 8"),
    "lr: fast": ("lr=fast", "a number", "--lr 5e-05"),
    "lr: .nan": ("lr=nan", "a finite number", "--lr 5e-05"),
    "mask_first_token: 1": ("mask_first_token=1", "true or false"),
    "run_name: 2024": ("run_name=2024", "a text, in a recipe quoted"),
    "datasets: 3": ("datasets=3", "a list of texts"),
    "datasets: [gsm8k, 3]": ("datasets=", "visible text", "--datasets synthetic"),
    "datasets: {gsm8k: 0.5}": ("datasets=", "a list of texts", "--datasets synthetic"),
    "datasets: []": ("datasets=", "at least one corpus", "--datasets gsm8k"),
    "kv_parts: [k, v]": ("kv_parts=", "a text", "--kv_parts auto"),
    "lr: 0.1\nlr: 0.2": ("key 'lr' stands there twice", "expected lines of `key: value`"),
    "- lr": ("holds a list", "expected a mapping"),
    "just words": ("holds a str", "expected a mapping"),
    "lr: [": ("not YAML", "expected lines of `key: value`"),
    "lr: !!python/object/apply:os.getcwd []": ("not YAML", "expected lines of `key: value`"),
    "lr: 2024-13-45": ("not YAML", "expected lines of `key: value`"),
    "batch_size: 010": ("'010' is read in base 8", "write it in base 10"),
    "max_minutes: 1:30": ("'1:30' is read in base 60", "write it in base 10"),
    "rkv_lambda: 1:0.5": ("'1:0.5' is read in base 60", "write it in base 10"),
    "run_name: 2024-01-01": ("run_name=2024-01-01", "a text, in a recipe quoted"),
    "run_name: yes": ("run_name=true", "a text, in a recipe quoted"),
    "resume: no": ("resume=false", "a text, in a recipe quoted"),
    "lr: 0.1\n---\nlr: 0.2": ("not YAML", "expected lines of `key: value`"),
    "lr: *other": ("not YAML", "undefined alias", "expected lines of `key: value`"),
    "? [lr, seed]\n: 3": ("not YAML", "expected lines of `key: value`"),
    "teacher_weights: [1, heavy]": ("teacher_weights=1 heavy", "numbers"),
}
# Two lines of anchors that would fill the memory if they were written out, as into a message.
_LISTS = ", ".join(f"&{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefghij", "bcdefghijk", strict=True))
RECIPES[f"datasets: [&a [1], {_LISTS}]"] = ("datasets=", "visible text on one line", "--datasets synthetic")
RECIPES["datasets: [0x" + "f" * 5000 + "]"] = ("datasets=", "visible text on one line", "--datasets synthetic")
RECIPES["seed: 0x" + "f" * 5000] = ("seed=", "a finite number", "--seed 0")

# The text of a DeepSpeed file.
DEEPSPEED: dict[str, tuple[str, ...]] = {
    '{"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}':
        ('zero_optimization.reduce_bucket_size="auto"', "drops silently", "a number"),
    '{"train_batch_size": "auto", "zero_optimization": {"stage": 3}}':
        ('train_batch_size="auto"', "drops silently", "a number"),
    '{"optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 3}}':
        ("'optimizer'", "--optimizer, --lr", "without it"),
    '{"scheduler": {"type": "WarmupLR"}, "zero_optimization": {"stage": 3}}':
        ("'scheduler'", "--lr_scheduler_type", "without it"),
    '{"fp16": {"enabled": true}, "zero_optimization": {"stage": 3}}': ("fp16 is on", "bf16 or neither"),
    '{"torch_autocast": {"enabled": true}, "zero_optimization": {"stage": 3}}':
        ("torch_autocast is on", "bf16 or neither"),
    '{"pipeline": {"stages": 2}, "zero_optimization": {"stage": 3}}': ("has pipeline", "pipeline stages", "without it"),
    '{"elasticity": {"enabled": true}, "zero_optimization": {"stage": 3}}': ("has elasticity", "without it"),
    '{"gradient_cliping": 1.0, "zero_optimization": {"stage": 3}}':
        ("unknown key gradient_cliping", "did you mean gradient_clipping", "rename"),
    '{"gradient_clipping": -1, "zero_optimization": {"stage": 3}}':
        ("gradient_clipping=-1", "a number of at least 0", "correct"),
    '{"gradient_clipping": "1.0", "zero_optimization": {"stage": 3}}':
        ('gradient_clipping="1.0"', "a number of at least 0", "correct"),
    '{"gradient_allreduce_op": "sum", "zero_optimization": {"stage": 3}}':
        ("gradient_allreduce_op", "no longer be means", "without"),
    '{"zero_optimization": {"stage": 3, "overlap_comms": true}}':
        ("unknown key zero_optimization.overlap_comms", "did you mean overlap_comm"),
    '{"zero_optimization": {"stage": 3, "overlap_comm": "yes"}}': ('overlap_comm="yes"', "true or false", "correct"),
    '{"zero_optimization": {"stage": 3, "reduce_bucket_size": 0.5}}':
        ("reduce_bucket_size=0.5", "a whole number", "correct"),
    '{"zero_optimization": {"stage": 4}}': ("zero_optimization.stage", "expected 3"),
    '{"zero_optimization": {}}': ("zero_optimization.stage", "expected 3"),
    '{"bf16": {"enabled": true}}': ("zero_optimization.stage", "expected 3"),
    '{"zero_optimization": true}': ("zero_optimization=true", "a section", "correct"),
    '{"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}':
        ('offload_param.device="gpu"', "none, cpu or nvme"),
    '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}':
        ("offload_param with stage 2", "stage 3"),
    "[]": ("holds a list", "a JSON object"),
    "": ("not JSON", "expected an object"),
    "{": ("not JSON", "expected an object"),
    '{"zero_optimization": {"stage": 3,}}': ("not JSON", "expected an object"),
    "\u0000": ("not JSON", "expected an object"),
    '{"zero_optimization": {"stage": 3, "stage": 2}}': ("stage stands there twice", "expected each key once"),
    '{"bf16": {"enabled": "false"}, "zero_optimization": {"stage": 3}}': ('bf16.enabled="false"', "true or false"),
    '{"bf16": {"enable": true}, "zero_optimization": {"stage": 3}}':
        ("unknown key bf16.enable", "did you mean enabled"),
    '{"data_types": {"grad_accum_dtype": "int8"}, "zero_optimization": {"stage": 3}}':
        ('grad_accum_dtype="int8"', "fp32 or bf16"),
    '{"data_types": {"grad_acum_dtype": "fp32"}, "zero_optimization": {"stage": 3}}':
        ("unknown key data_types.grad_acum_dtype", "did you mean grad_accum_dtype"),
    '{"communication_data_type": "fp8", "zero_optimization": {"stage": 3}}':
        ('communication_data_type="fp8"', "fp32 or bf16"),
    '{"log_level": "loud", "zero_optimization": {"stage": 3}}': ('log_level="loud"', "debug, info, warning"),
    '{"steps_per_print": 0, "zero_optimization": {"stage": 3}}': ("steps_per_print=0", "at least 1"),
    '{"aio": {"block_size": "x"}, "zero_optimization": {"stage": 3}}': ('aio.block_size="x"', "at least 1"),
    '{"wandb": {"enabled": true}, "zero_optimization": {"stage": 3}}':
        ("wandb is on", "package wandb is not installed", "no wandb in the file"),
    '{"gradient_predivide_factor": 2, "zero_optimization": {"stage": 3}}': ("has gradient_predivide_factor", "fp16"),
    '{"gradient_clipping": NaN, "zero_optimization": {"stage": 3}}': ("gradient_clipping=NaN", "at least 0"),
    '{"zero_optimization": {"stage": 3, "sub_group_size": 0}}': ("sub_group_size=0", "at least 1"),
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}':
        ("offload_optimizer.nvme_path=null", "a folder that is there", "device cpu"),
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"pin_memry": true}}}':
        ("offload_optimizer.pin_memry", "did you mean pin_memory"),
    '{"zero_optimization": {"stage": 3, "leaf_module": {"classes": 3}}}': ("leaf_module.classes=3", "a list of texts"),
    '{"a": ' * 100_000: ("not JSON", "expected an object"),
}
