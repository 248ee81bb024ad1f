"""Which blueprint each slot holds, as numbers the network learns (esper-lite V2)."""

import torch
from torch import Tensor, nn

NO_BLUEPRINT = -1


class BlueprintEmbedding(nn.Module):
    """`[..., slots]` int64 of -1 (none) or a blueprint's index, to `[..., slots * dim]`.

    None has a row of its own, the last; its index is a buffer, as in esper-lite's state_dict.
    """

    _null_idx: Tensor

    def __init__(self, num_blueprints: int, dim: int) -> None:
        super().__init__()
        self.num_blueprints = num_blueprints
        self.embedding = nn.Embedding(num_blueprints + 1, dim)
        self.register_buffer("_null_idx", torch.tensor(num_blueprints, dtype=torch.int64))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, blueprint_index: Tensor) -> Tensor:
        index = torch.where(blueprint_index < 0, self._null_idx, blueprint_index)
        embedded: Tensor = self.embedding(index)
        return embedded.flatten(-2)
