"""Data, tokenizers, models, checkpoints, caches and commands that must be refused, each with what its line must hold.

``@`` stands for the folder that ``bad_input_files.make_files`` filled; ``test_bad_input.py`` runs them all.
"""

from tests.hostile.bad_input_files import CACHES, TRAINED_WITH

Case = tuple[dict[str, str], tuple[str, ...]]

# fmt: off
# Changes to the flags of a run that works.
RUNS: dict[str, Case] = {
    "unknown corpus": ({"datasets": "gsm8l"}, ("datasets=gsm8l", "did you mean gsm8k?")),
    "malformed row": (
        {"datasets": "@/malformed.jsonl"}, ("@/malformed.jsonl:2: 'answer' is missing", "--on_bad_row skip")),
    "no JSON": ({"datasets": "@/broken.jsonl"}, ("@/broken.jsonl:3: not JSON", "--on_bad_row skip")),
    "a field twice": (
        {"datasets": "@/twice.jsonl"}, ("@/twice.jsonl:2: 'answer' stands there twice", "--on_bad_row skip")),
    "an archive": ({"datasets": "@/archive.jsonl"}, ("@/archive.jsonl:1: not UTF-8 text", "--on_bad_row skip")),
    "UTF-16": ({"datasets": "@/utf16.jsonl"}, ("@/utf16.jsonl:1: not UTF-8 text", "--on_bad_row skip")),
    "no list": ({"datasets": "@/list.json"}, ("@/list.json:1: no JSON list", "name a file of JSON lines .jsonl")),
    "the mark in a rationale": (
        {"datasets": "@/marked.jsonl"}, ("@/marked.jsonl:1: the rationale holds '####'", "skip")),
    "held-out rows": (
        {"datasets": "@/held_out_is_bad.jsonl", "eval_subset_size": "5"},
        ("held_out_is_bad.eval.jsonl:1: ", "prompt and answer", "--columns")),
    "malformed corpus": (
        {"datasets": "svamp", "data_dir": "@/data"}, ("SVAMP.json:2: 'Answer' is None", "expected a number")),
    "a row of no split": (
        {"datasets": "svamp", "data_dir": "@/data_unnumbered"},
        ("SVAMP.json:2: 'ID' is 'one'", "expected chal-NUMBER")),
    "a list cut off": ({"datasets": "svamp", "data_dir": "@/data_cut"}, ("SVAMP.json:3: not JSON", "a list of rows")),
    "no mark": (
        {"datasets": "gsm8k", "data_dir": "@/data_unmarked"}, ("train.jsonl:1: 'answer' has no '#### NUMBER'", "skip")),
    "no choices": ({"datasets": "arc_easy", "data_dir": "@/data"}, ("Train.jsonl:1: 0 choices", "expected 3 to 5")),
    "no boolean": (
        {"datasets": "strategyqa", "data_dir": "@/data"},
        ("train.json:1: 'answer' is 'yes'", "expected true or false")),
    "arc twice": ({"datasets": "arc:2 arc_easy", "data_dir": "@/data"}, ("arc_easy", "arc holds its rows already")),
    "empty corpus": ({"datasets": "@/blank.jsonl"}, ("blank.jsonl: no usable row", "expected at least one")),
    "missing corpus": ({"datasets": "gsm8k", "data_dir": "@/data"}, ("gsm8k/train.jsonl: No such file", "--data_dir")),
    "corpus without a network": (
        {"datasets": "gsm8k"}, ("datasets=gsm8k: openai/gsm8k could not be loaded", "--data_dir FOLDER")),
    "one prompt": (
        {"datasets": "@/single.jsonl", "eval_subset_size": "5"}, ("none can be held out", "--eval_subset_size 0")),
    "rows too long": ({"max_length": "9"}, ("20 longer than --max_length 9", "raise --max_length")),
    "too many positions": ({"max_length": "65"}, ("max_length=65", "64 positions", "--max_length 64 or less")),

    "other tokenizer": (
        {"student_name": "@/other_tokenizer"}, ("--student_name=@/other_tokenizer: its tokenizer", "one vocabulary")),
    "tokenizer without an end": ({"tokenizer_name": "@/endless"}, ("no end-of-text token", "--tokenizer_name")),
    "no tokenizer": ({"tokenizer_name": ""}, ("hold no tokenizer", "--tokenizer_name FOLDER")),
    "no tokenizer there": ({"tokenizer_name": "@/model"}, ("--tokenizer_name=@/model: holds no tokenizer", "FOLDER")),
    "tokenizer cut off": (
        {"tokenizer_name": "@/tokenizer_cut"}, ("--tokenizer_name=@/tokenizer_cut: ", "no loadable tokenizer")),
    "tokenizer of another kind": (
        {"tokenizer_name": "@/tokenizer_of_another_kind"},
        ("--tokenizer_name=@/tokenizer_of_another_kind", "loadable")),
    "tokenizer that nests": (
        {"tokenizer_name": "@/tokenizer_nested"}, ("tokenizer_nested: its tokenizer nests too deep",)),
    "tokenizer settings": ({"tokenizer_name": "@/tokenizer_config_list"}, ("no loadable tokenizer", "save_pretrained")),
    "tokenizer with a number": ({"tokenizer_name": "@/tokenizer_ends_in_a_number"}, ("eos_token", "save_pretrained")),
    "tokenizer with words": ({"tokenizer_name": "@/tokenizer_added"}, ("no loadable tokenizer", "save_pretrained")),
    "small vocabulary": (
        {"student_init": "random", "student_config_overrides": "vocab_size=50"},
        ("--student_name: vocab_size 50", "vocab_size=")),

    "unknown family": (
        {"teacher_name": "@/t5"}, ("model_type=t5 is no causal language model", "expected one, such as")),
    "no configuration": (
        {"teacher_name": "@/empty"}, ("--teacher_name=@/empty: the folder holds no loadable config.json",)),
    "configuration that is a list": (
        {"teacher_name": "@/config_list"}, ("--teacher_name=@/config_list: ", "no loadable config.json")),
    "configuration that nests": (
        {"student_name": "@/config_nested"}, ("config_nested: its config.json nests too deep",)),
    "a size in words": ({"student_name": "@/config_wide"}, ("config_wide", "expected int, got str", "save_pretrained")),
    "a negative size": ({"student_name": "@/config_negative"}, ("config_negative: hidden_size is -16", "at least 1")),
    "no heads": (
        {"teacher_name": "@/config_without_heads"}, ("num_attention_heads is 0", "at least 1 (in config.json)")),
    "unknown activation": ({"student_name": "@/config_unknown_activation"}, ("no model can be built", "'magic'")),
    "unknown rotation": (
        {"teacher_name": "@/config_unknown_rope"}, ("--teacher_name=", "no model can be built", "'magic'")),
    "padding outside": (
        {"student_name": "@/config_bad_padding", "student_init": "random"}, ("no model can be built", "Padding_idx")),
    "layers that differ": ({"student_name": "@/config_layers"}, ("config_layers", "num_hidden_layers", "layer_types")),
    "quantized model": ({"student_name": "@/config_quantized"}, ("--student_name=@/config_quantized", "bitsandbytes")),
    "model without a network": (
        {"student_name": "gpt2"}, ("--student_name=gpt2", "without internet", "--local-dir FOLDER")),
    "unknown override": (
        {"student_config_overrides": "layers=3"}, ("layers=3: qwen2 has no such setting", "config.json keys")),
    "override of another type": (
        {"teacher_config_overrides": "hidden_size=wide"}, ("hidden_size=wide: expected int", "got str")),
    "override of the family": (
        {"teacher_config_overrides": "model_type=llama"}, ("model_type=llama", "--teacher_name")),
    "override to nothing": ({"teacher_config_overrides": "vocab_size=0"}, ("vocab_size=0", "at least 1")),
    "heads that do not fit": (
        {"student_init": "random", "student_config_overrides": "num_key_value_heads=3"},
        ("num_key_value_heads=3", "a multiple")),
    "no weights": ({"student_name": "@/no_weights"}, ("--student_name=@/no_weights", "model.safetensors", "the files")),
    "a weight is missing": (
        {"student_name": "@/one_missing"},
        ("1 weights are missing (first: model.norm.weight)", "--student_init random")),
    "weights cut off": ({"teacher_name": "@/cut_off"}, ("--teacher_name=@/cut_off", "no loadable model", "the files")),
    "weights of no bytes": ({"student_name": "@/weights_empty"}, ("weights_empty", "no loadable model", "the files")),
    "weights of noise": ({"student_name": "@/weights_noise"}, ("weights_noise", "no loadable model", "the files")),
    "a head of its own": (
        {"student_name": "@/own_head"}, ("lm_head.weight differs from model.embed_tokens.weight", "in config.json")),
    "a surplus layer": (
        {"teacher_name": "@/surplus_layer"},
        ("1 tensors have no place in its configuration (first: model.layers.2.mlp.up_proj.weight)", "whole model")),
    "a surplus bias": (
        {"student_name": "@/surplus_bias"}, ("@/surplus_bias: 1 tensors have no place", "mlp.up_proj.bias")),
    "pickled weights": (
        {"teacher_name": "@/pickled"}, ("only pytorch_model.bin", "safetensors alone", "save_pretrained")),
    "two sets of weights": ({"student_name": "@/two_sets"}, ("other.safetensors is no part of the model", "move them")),
    "an adapter": (
        {"teacher_name": "@/adapter"}, ("@/adapter: ", "it is an adapter of some/base", "merge_and_unload")),
    "an index that leads away": (
        {"student_name": "@/index_leads_away"}, ("lies in '../model/model.safetensors'", "of the folder itself")),
    "fewer layers of pretrained weights": (
        {"student_config_overrides": "num_hidden_layers=1"},
        ("num_hidden_layers=1 for pretrained weights of 2 layers", "use kvds prune (or --student_init random)")),

    "batch arithmetic": ({"deepspeed_config": "@/batch.json"}, ("train_batch_size", "7", "4")),
    "what DeepSpeed refuses": (
        {"deepspeed_config": "@/tag.json"},
        ("deepspeed_config=@/tag.json: DeepSpeed refuses it", "PERHAPS", "expected")),
    "groups": ({"layer_groups": "3"}, ("layer_groups", "3")),
    "head groups": ({"head_groups": "2"}, ("head_groups=2", "divides the KV heads of the student (1)")),
    "teacher too narrow": (
        {"direction": "teacher_to_student", "teacher_init": "random", "teacher_config_overrides": "head_dim=6"},
        ("direction=teacher_to_student: a map from the teacher's 6 dimensions", "of its 8", "--direction student_to")),
    "teacher without directions": (
        {"map_start": "pca", "teacher_init": "random", "teacher_config_overrides": "head_dim=6"},
        ("map_start=pca: the teacher's 6 dimensions", "no 8 principal directions", "--map_start procrustes")),
    "kernel without a GPU": ({"impl": "triton"}, ("impl=triton: ", "impl=auto")),

    "output under a file": (
        {"output_dir": "@/single.jsonl/run"}, ("output_dir=@/single.jsonl/run: Not a directory", "made")),
    "output nowhere": ({"output_dir": "/proc/kvds"}, ("output_dir=/proc/kvds: ", "another --output_dir")),
    "output full of folders": (
        {"output_dir": "@/folders"}, ("output_dir=@/folders: ", "config.yaml, which a run writes, is a folder")),
    "output of a long name": ({"output_dir": "@/" + "x" * 300}, ("output_dir=@/xxx", "File name too long")),
    "lost checkpoint": ({"output_dir": "@/lost"}, ("@/lost/checkpoints/latest: names 'step-000001'", "--resume never")),
    "checkpoint led away": (
        {"output_dir": "@/led_away"}, ("latest: names '../../x'", "a folder step-NNNNNN beside it")),
    "checkpoint without its settings": (
        {"output_dir": "@/strange"}, ("@/strange/config.yaml: missing", "--resume never")),
    "damaged settings": (
        {"output_dir": "@/damaged_settings"}, ("damaged_settings/config.yaml: not YAML", "key: value")),
    "checkpoint without manifest": (
        {"output_dir": "@/unlisted"},
        ("step-000003: not whole, manifest.json is missing, and none before it is whole", "--resume never")),
    "checkpoint of files elsewhere": (
        {"output_dir": "@/escaping"},
        ("manifest.json names '../../../x'", "no file of this checkpoint", "--resume never")),
    "checkpoint with a flipped bit": (
        {"output_dir": "@/flipped"},
        ("step-000003: not whole, states.pt does not have the checksum", "none before it is whole", "--resume never")),
    "resume elsewhere": ({"resume": "@/data"}, ("resume=@/data", "--output_dir")),
    "nothing to resume": ({"resume": "@/data", "output_dir": "@/data"}, ("resume=@/data: no checkpoint there", "auto")),
    **{f"resumed with another {name}": ({"output_dir": f"@/trained_with_{name}"},
                                        (f"--{name} ", "was trained with", "--resume never")) for name in TRAINED_WITH},

    "no cache": ({"teacher_cache": "@/empty"}, ("teacher_cache=@/empty: holds no manifest.json", "`kvds cache`")),
    **{f"{name}": ({"teacher_cache": f"@/{name}"}, (f"teacher_cache=@/{name}/manifest.json: damaged", "run it again"))
       for name in CACHES if name not in ("cache_without_shards", "cache_of_something", "cache_of_before")},
    "cache without its shards": (
        {"teacher_cache": "@/cache_without_shards"},
        ("shard-00000.safetensors: missing or cut short", "expected 1 bytes")),
    "cache of something else": (
        {"teacher_cache": "@/cache_of_something"}, ("its tokenizer is another, the run's ", "the run's own flags")),
    "cache of an earlier version": (
        {"teacher_cache": "@/cache_of_before"}, ("teacher_cache=@/cache_of_before", "earlier version", "kvds cache")),
}
# What a dry run does not see: it makes no folder.
NOT_DRY = {"output nowhere"}

# `kvds …`
COMMANDS = {
    "reprot": ("unknown command reprot", "did you mean report?"),
    "ab @/nowhere.yaml": ("@/nowhere.yaml: No such file", "expected"),
    "ab @/plan.yaml": ("@/plan.yaml: seeds is missing", "expected a line"),
    "ab launch/recipes/experiments/problems_300.yaml --only nobody": ("--only nobody", "expected arms of the plan"),
    "ab launch/recipes/experiments/problems_300.yaml --workers 0": ("--workers 0", "at least 1"),
    "doctor --ranks 0": ("--ranks 0", "at least 1"),
    "eval --model @/nowhere": ("--model @/nowhere: no such folder", "expected"),
    "eval --model @/weights_noise --tokenizer @/tokenizer":
        ("--model=@/weights_noise: the folder holds no loadable model", "expected"),
    "eval --model @/own_head --tokenizer @/tokenizer": ("--model=@/own_head: lm_head.weight differs", "expected"),
    "eval --model @/surplus_bias --tokenizer @/tokenizer": ("1 tensors have no place in its", "expected"),
    "eval --model @/adapter --tokenizer @/tokenizer": ("it is an adapter of some/base", "expected it merged"),
    "eval --model @/one_missing --tokenizer @/tokenizer":
        ("1 weights are missing (first: model.norm.weight)", "whole model"),
    "eval --model @/model --tokenizer @/tokenizer_nested":
        ("--tokenizer=@/tokenizer_nested: its tokenizer nests too deep", "expected"),
    "eval --model @/model --tokenizer @/tokenizer --datasets gsm8l": ("datasets=gsm8l", "did you mean gsm8k?"),
    "prune --model_name @/model --layers 1 --output @/out --max_lossy_rows 2":
        ("--max_lossy_rows 2.0: expected a share", "from 0 to 1"),
    "eval --model @/model --output @/single.jsonl": ("--output @/single.jsonl: is a file", "expected a folder"),
    "export --run @/nowhere --output @/out": ("@/nowhere: no such folder", "expected"),
    "export --run @/data --output @/out": ("--run @/data: no checkpoint", "expected"),
    "export --run @/led_away --output @/out": ("latest: names '../../x'", "expected a folder step-NNNNNN"),
    "export --run @/flipped --output @/out": ("step-000003: not whole, states.pt does not have the checksum", "--step"),
    "export --run @/flipped --output @/out --step 4": ("no checkpoint step-000004", "step-000003"),
    "plan @/nowhere.yaml": ("@/nowhere.yaml: No such file", "expected a recipe file"),
    "plan launch/recipes/quickstart.yaml --gpu-memory 80XB": ("--gpu-memory 80XB", "such as 80GiB"),
    "plan launch/recipes/quickstart.yaml --gpus -1": ("--gpus", "at least 0"),
    "plan launch/recipes/quickstart.yaml --set batch_size": ("--set batch_size", "KEY=VALUE"),
    "plan quickstart --set batch_sise=3": ("unknown flag --batch_sise", "did you mean --batch_size"),
    "prefetch @/nowhere.yaml --to @/hub": ("@/nowhere.yaml: No such file", "expected a recipe file"),
    "prefetch launch/recipes/quickstart.yaml --to @/single.jsonl": ("--to @/single.jsonl: is a file", "a folder"),
    "profile --run @/data": ("@/data", "expected"),
    "report @/data --output @/out": ("@/data", "expected"),
    "track @/nowhere": ("@/nowhere: no such folder", "expected the --output_dir of a run"),
    "track @/data": ("@/data", "expected"),
}
# `kvds cache …` with the flags of a run that works.
CACHE_COMMANDS = {
    "--output @/single.jsonl": ("--output @/single.jsonl: is a file", "expected a folder"),
    "--output @/out --shard_samples 0": ("--shard_samples 0", "at least 1 row"),
    "--output @/cache_cut": ("@/cache_cut/fingerprint.json: damaged", "remove the folder"),
}
