"""A batched Neural Turing Machine in plain PyTorch, from the equations of the paper: the peer of `training_speed.py`.

Written to be fair: every operation runs on the whole batch and on all heads at once, parameters come out of one linear
layer, and nothing loops over sequences, heads or slots. The operations of one step, forward: one LSTM cell (2 matrix
products), 2 linear layers, 7 activations on slices, one cosine similarity over the memory (2 norms, 1 batched product),
2 softmaxes, 1 interpolation, 3 rolls for the shift, 1 power and 1 normalization, 2 outer products for the write, 1
batched product for the read. Only the time loop is Python, as in every PyTorch NTM that we know.
"""

import torch
from torch import nn
from torch.nn import functional


class TorchNTM(nn.Module):
    """LSTM controller, output from the controller beside the vectors read: the paper's LSTM-NTM.

    Args:
        input_dim: values in an input step.
        output_dim: values in an output step.
        units: of the LSTM controller.
        n_slots: the paper's N.
        m_depth: the paper's M.
        heads: read heads, and as many write heads.
    """

    def __init__(self, input_dim, output_dim, *, units=100, n_slots=128, m_depth=20, heads=1):
        super().__init__()
        self.n_slots, self.m_depth, self.heads, self.units = n_slots, m_depth, heads, units
        self.controller = nn.LSTMCell(input_dim + heads * m_depth, units)
        self.sizes = (m_depth, 1, 1, 3, 1)  # k, beta, g, s, gamma of each head
        self.head_layer = nn.Linear(units, 2 * heads * sum(self.sizes) + 2 * heads * m_depth)
        self.output_layer = nn.Linear(units + heads * m_depth, output_dim)
        logits = torch.zeros(2 * heads, n_slots)
        logits[:, 0] = 8.0
        self.first_weighting_logits = nn.Parameter(logits)

    def forward(self, sequences):
        """``[batch, time, input_dim]`` to the logits ``[batch, time, output_dim]``."""
        batch = sequences.shape[0]
        memory = sequences.new_full((batch, self.n_slots, self.m_depth), 1e-6)
        weighting = functional.softmax(self.first_weighting_logits, dim=-1).expand(batch, -1, -1)
        reads = weighting[:, : self.heads] @ memory
        state = (sequences.new_zeros(batch, self.units), sequences.new_zeros(batch, self.units))
        outputs = []
        for inputs in sequences.unbind(1):
            state = self.controller(torch.cat([inputs, reads.flatten(1)], dim=1), state)
            addressing, erase, add = self._head_parameters(state[0])
            weighting = self._address(memory, weighting, addressing)
            focus = weighting[:, self.heads :, :, None]
            memory = memory * torch.prod(1 - focus * torch.sigmoid(erase)[:, :, None, :], dim=1)
            memory = memory + torch.sum(focus * torch.tanh(add)[:, :, None, :], dim=1)
            reads = weighting[:, : self.heads] @ memory
            outputs.append(self.output_layer(torch.cat([state[0], reads.flatten(1)], dim=1)))
        return torch.stack(outputs, dim=1)

    def _head_parameters(self, hidden):
        raw = self.head_layer(hidden).clamp(-20, 20)
        heads, width = 2 * self.heads, sum(self.sizes)
        addressing, writing = raw.split([heads * width, 2 * self.heads * self.m_depth], dim=1)
        erase, add = writing.unflatten(1, (2, self.heads, self.m_depth)).unbind(1)
        return addressing.unflatten(1, (heads, width)), erase, add

    def _address(self, memory, previous, raw):
        key, strength, gate, shifts, gamma = raw.split(self.sizes, dim=-1)
        key, gate = torch.tanh(key), torch.sigmoid(gate)
        dots = key @ memory.transpose(1, 2)
        cosine = dots / (key.norm(dim=-1, keepdim=True) * memory.norm(dim=-1)[:, None, :] + 1e-12)
        content = functional.softmax(functional.softplus(strength) * cosine, dim=-1)
        gated = gate * content + (1 - gate) * previous
        shifts = functional.softmax(shifts, dim=-1)
        shifted = sum(gated.roll(offset, dims=-1) * shifts[..., i : i + 1] for i, offset in enumerate((-1, 0, 1)))
        sharp = (shifted + 1e-12) ** (1 + functional.softplus(gamma))
        return sharp / sharp.sum(dim=-1, keepdim=True)
