"""How far off a product of rows rounded in blocks may be, in float64."""

import torch


def half_steps(rows, codes):
    """Half the step of each place of `rows [M, J]`, from the definition in blocks.c, in float64."""
    steps = torch.empty(rows.shape, dtype=torch.float64)
    for start in range(0, rows.shape[1], 64):
        block, part = rows[:, start : start + 64].double(), codes[:, start : start + 64].double()
        low = torch.arange(block.shape[1]) % 4 < 2  # the two lanes of a sum
        lengths = [(block[:, lane].norm(dim=1), part[:, lane].norm(dim=1)) for lane in (low, ~low)]
        longest = max(1, *(codes_.max() for _, codes_ in lengths))
        length = torch.maximum(*(rows_ for rows_, _ in lengths))
        room = 32767 * 0.9999 / longest - 2.83
        step = torch.maximum(block.abs().amax(1) / 63, length / room)
        steps[:, start : start + 64] = step[:, None]
    return steps / 2
