"""Two ranks that share a teacher's heads compare what each gets with a whole teacher's: run by ``deepspeed``.

One launch for all families, padded and packed rows, keys before and after rotation.
"""

from itertools import product

import torch
from torch import distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from kvds.data.batches import TokenBatch, collate, collate_packed
from kvds.data.encoding import EncodedSample
from kvds.data.model_inputs import repacked, unpacked
from kvds.distributed.process_group import init_distributed, leave_distributed
from kvds.kv import select_tokens
from kvds.kv.row_attention import ROW_ATTENTION
from kvds.teacher.teacher import Teacher

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma")


def model_of(family: str) -> torch.nn.Module:
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        family, vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=ROW_ATTENTION)


def batches(rank: int) -> list[TokenBatch]:
    """Rows of this rank alone, of other lengths and another number than the other rank's."""
    draw = torch.Generator().manual_seed(rank)
    rows = []
    for number in range(3 + rank):
        length = int(torch.randint(4, 12, (), generator=draw))
        ids = torch.randint(1, 50, (length,), generator=draw).tolist()
        rows.append(EncodedSample(tuple(ids), (1, 2) + (3,) * (length - 2), number))
    numbers = list(range(len(rows)))
    return [
        collate(rows, numbers, 0, 1.0, 1.0),
        collate_packed(rows, numbers, 0, 1.0, 1.0, capacity=24),
    ]


def main() -> None:
    init_distributed()
    rank, device = dist.get_rank(), torch.device("cpu")
    for family, rope in product(FAMILIES, ("pre", "post")):
        whole = Teacher(model_of(family), device=device, rope=rope)
        shared = Teacher(model_of(family), device=device, rope=rope, tensor_parallel=2)
        weights = [sum(p.numel() for p in teacher._backbone.layers.parameters()) for teacher in (whole, shared)]
        assert weights[1] < 0.6 * weights[0], (family, weights)
        assert shared.shape == whole.shape
        for batch, budget in product(batches(rank), (None, 3)):
            alone = unpacked(batch)
            method = "full" if budget is None else "right_crop"
            selection = repacked(select_tokens(method, budget, alone.segment_ids, alone.attention_mask), batch)
            expected, found = (teacher(batch, selection).states for teacher in (whole, shared))
            for side in ("keys", "values"):
                for a, b in zip(getattr(found, side), getattr(expected, side), strict=True):
                    assert a.shape == b.shape, (family, side, a.shape, b.shape)
                    real = a.new_ones(a.shape, dtype=torch.bool)
                    if a.shape[2] == batch.attention_mask.shape[1]:  # what padding computes is nobody's business
                        real &= batch.attention_mask.bool()[:, None, :, None]
                    torch.testing.assert_close(a[real], b[real], rtol=1e-5, atol=1e-5, msg=f"{family} {rope} {side}")
    exchanged: list[int] = []
    gather = dist.gather
    dist.gather = lambda heads, *rest, **how: exchanged.append(heads.numel()) or gather(heads, *rest, **how)
    [batch, _] = batches(rank)
    sizes = []
    for parts in (("keys", "values"), ("values",)):
        exchanged.clear()
        shared = Teacher(model_of("qwen2"), device=device, tensor_parallel=2, parts=parts)
        states = shared(batch).states
        sizes.append(sum(exchanged))
        layers = shared.shape.num_hidden_layers
        assert states is not None and len(states.values) == layers
        assert len(states.keys) == (layers if "keys" in parts else 0)
    assert 2 * sizes[1] == sizes[0] > 0, sizes  # what nobody compares is not sent
    print(f"rank {rank}: all equal", flush=True)
    leave_distributed()


if __name__ == "__main__":
    main()
