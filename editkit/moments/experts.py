"""Second moments of a mixture of experts: one block of C an expert.

The stacked key κ = [g_1 k_1; …; g_E k_E] of models/experts.py has D = E · d_ff numbers, and ROME's least squares wants
C = E[κ κᵀ] [D, D]. Of it the diagonal blocks alone are collected and solved with, and 0 stands for the rest:

    C_e = (1/N) Σ g_e² k_e k_eᵀ   [d_ff, d_ff]        the sum over the tokens sent to e, N all tokens of the text

- The whole C does not fit: in float64 one block of the model would take 105 GB for Mixtral 8x7B, 34 GB for OLMoE-1B-7B,
  77 GB for Qwen3-30B-A3B and 2.2 TB for DeepSeek-V3. The blocks take 13, 0.5, 0.6 and 8.6 GB. C of the active experts
  alone would be smaller than the whole, but it would be another one for each fact.
- What is lost is bounded. The methods keep E‖ΔW κ‖² small. With the blocks they minimise Σ_e E‖ΔW_e g_e k_e‖², and as
  ‖Σ a_e‖² ≤ n Σ ‖a_e‖² for a token with n experts, E‖ΔW κ‖² is never more than n times that. On tiny random models of
  all families it is less than 15 % over what the whole C reaches (tests/test_experts.py).
- N counts all tokens, as in C itself, and not those of the expert: where the text seldom sends a token, a change costs
  little. One ridge is added to all blocks: moments.ridge · mean(diag C).
"""

import torch
from torch import Tensor

from editkit.errors import EditkitError
from editkit.moments.factored import Factored, cholesky, solved


class FactoredExperts(Factored):
    """C of a mixture of experts, one block [d_ff, d_ff] an expert: each is factored when a key first needs it."""

    def __init__(self, module: str, blocks: Tensor, shift: float, routed: tuple[int, ...]) -> None:
        """`blocks` [E, d_ff, d_ff]: those of C. `shift`: the ridge, added to each diagonal. `module`, `routed`: of the
        moment, for its errors."""
        super().__init__(torch.empty(0, dtype=torch.float64))
        self._module, self._blocks, self._shift, self._routed = module, blocks, shift, routed
        self._lowers: dict[int, Tensor] = {}

    def solve(self, keys: Tensor) -> Tensor:
        """C⁻¹ κ for stacked keys [E · d_ff] or [E · d_ff, n], in float64 on the CPU; 0 for experts without a key.

        Raises EditkitError for an expert that the text has given no key, or whose block is singular.
        """
        k = keys.detach().double().cpu().reshape(len(self._blocks), self._blocks.shape[-1], -1)
        found = torch.zeros_like(k)
        for expert in k.any(-1).any(-1).nonzero().flatten().tolist():
            found[expert] = solved(self._lower(expert), k[expert])
        return found.view(keys.shape)

    def _lower(self, expert: int) -> Tensor:
        if expert not in self._lowers:
            lower, failed = cholesky(self._blocks[expert], self._shift)
            if failed or not self._routed[expert]:
                raise EditkitError(
                    f"The second moment of expert {expert} at {self._module} is singular: the text has sent it "
                    f"{self._routed[expert]} tokens for {len(lower)} dimensions, and the fact's tokens go to it. Raise "
                    "moments.tokens, or take a longer text in moments.source."
                )
            self._lowers[expert] = lower
        return self._lowers[expert]

    def matrix(self, size: int) -> Tensor:
        whole: Tensor = torch.block_diag(*self._blocks)
        whole.diagonal().add_(self._shift)
        return whole

    @property
    def condition(self) -> float:
        """Condition number of the blocks that were solved with, together; of all where none was."""
        used = list(self._lowers) or range(len(self._blocks))
        values = torch.linalg.eigvalsh(self._blocks[torch.tensor(used)])
        return float((values.max() + self._shift) / (values.min() + self._shift))
