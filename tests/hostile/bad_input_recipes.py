"""Recipes and DeepSpeed files that must be refused, as in ``bad_input_settings.py``."""

# fmt: off
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
    '{"comet": {"enabled": true}, "zero_optimization": {"stage": 3}}':
        ("comet is on", "package comet_ml is not installed", "no comet in the file"),
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
