"""Turn drawings into varied training pictures: change place, colours and background, add outlines and noise.

The strength k in [0, 1] scales every change. Training that starts at full strength is several times slower than
training that starts with mild pictures (EYES.md), so k rises during the run.
"""

import torch
import torch.nn.functional as F

CHUNK = 16  # drawings per chunk, so that the intermediate tensors fit in the cache of a CPU core


def augment(pixels, mono, size: int, k: float, generator) -> torch.Tensor:
    """Turn drawings into augmented pictures.

    Args:
        pixels: (B, 4, 96, 96) uint8, RGBA drawings.
        mono: (B,) bool, True for a drawing of one colour; it gets a random fill.
        size: side of the pictures in pixels.
        k: strength, 0 to 1.
        generator: source of all random numbers.

    Returns:
        Pictures (B, 3, size, size) in [0, 1].
    """
    return compose(pixels, mono, torch.zeros(len(pixels), 1, dtype=torch.long), 1, size, k, generator)[0]


def compose(pixels, mono, cells, grid: int, size: int, k: float, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn drawings into augmented pictures that each show n of them.

    Args:
        pixels: (B * n, 4, 96, 96) uint8, RGBA drawings; each n that follow one another share a picture.
        mono: (B * n,) bool, True for a drawing of one colour; it gets a random fill.
        cells: (B, n) the cell of each drawing, a number below `grid` * `grid` that counts row by row.
        grid: number of cells along a side of the picture.
        size: side of the pictures in pixels.
        k: strength, 0 to 1.
        generator: source of all random numbers.

    Returns:
        Pictures (B, 3, size, size) in [0, 1], and their coverage (B, size, size): 1 where a drawing is opaque.
    """
    n, pictures, coverage = cells.shape[1], [], []
    per_chunk = max(1, CHUNK // n)
    for i in range(0, len(cells), per_chunk):
        there = cells[i : i + per_chunk]
        hand, rows = Hand(there.numel(), -(-size // grid), k, generator), slice(i * n, i * n + there.numel())
        x = hand.draw(pixels[rows], mono[rows])
        if grid > 1:
            x = lay_out(x, there, grid)[..., :size, :size]
        picture = Hand(len(there), size, k, generator).finish(x)
        pictures.append(picture)
        coverage.append(x[:, 3])
    return torch.cat(pictures), torch.cat(coverage)


def lay_out(x, cells, grid: int) -> torch.Tensor:
    """Put tiles (B * n, C, t, t) into the cells (B, n) of transparent pictures (B, C, grid * t, grid * t)."""
    (B, n), (C, t) = cells.shape, x.shape[1:3]
    canvas = x.new_zeros(B, grid * grid, C, t, t)
    canvas[torch.arange(B)[:, None], cells] = x.view(B, n, C, t, t)
    return canvas.view(B, grid, grid, C, t, t).permute(0, 3, 1, 4, 2, 5).reshape(B, C, grid * t, grid * t)


def on_white(pixels, size: int) -> torch.Tensor:
    """Place drawings (B, 4, h, h) uint8 on white; return pictures (B, 3, size, size) in [0, 1].

    The drawing fills 88 % of the picture, about as much as in the evaluation files.
    """
    x = pixels.float() / 255
    x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], 1)
    inner = round(0.88 * size)
    x = F.interpolate(x, size=(inner, inner), mode="bilinear", antialias=True, align_corners=False)
    before = (size - inner) // 2
    x = F.pad(x, (before, size - inner - before) * 2)
    return x[:, :3] + 1 - x[:, 3:]


def grow(x, steps: int) -> torch.Tensor:
    """Return for each pixel the greatest value within `steps` pixels along both axes.

    This is several times as fast as max pooling.
    """
    for axis in (2, 3):
        n = x.shape[axis]
        for _ in range(steps):
            y = x.clone()
            torch.maximum(y.narrow(axis, 1, n - 1), x.narrow(axis, 0, n - 1), out=y.narrow(axis, 1, n - 1))
            torch.maximum(y.narrow(axis, 0, n - 1), x.narrow(axis, 1, n - 1), out=y.narrow(axis, 0, n - 1))
            x = y
    return x


class Hand:
    """Draw one chunk of B drawings with random changes."""

    def __init__(self, B: int, size: int, k: float, generator):
        self.B, self.size, self.k, self.generator = B, size, k, generator

    def normal(self, scale: float) -> torch.Tensor:
        """Return (B,) normal random numbers with a standard deviation of `scale` times the strength."""
        return torch.randn(self.B, generator=self.generator) * scale * self.k

    def uniform(self, *shape) -> torch.Tensor:
        """Return random numbers in [0, 1) of the given shape."""
        return torch.rand(*shape, generator=self.generator)

    def chosen(self, share: float) -> torch.Tensor:
        """Return the indices of randomly chosen drawings; at full strength they are `share` of the chunk."""
        return torch.nonzero(self.uniform(self.B) < share * self.k).flatten()

    def draw(self, pixels, mono) -> torch.Tensor:
        """Turn drawings (B, 4, h, h) into tiles (B, 4, size, size) whose colours are multiplied by their alpha.

        `mono` marks drawings of one colour.
        """
        x = self.recolour(pixels, mono)
        x[:, :3] *= x[:, 3:]  # because `move` interpolates
        x = self.move(x)
        self.outline(x)
        return x

    def recolour(self, pixels, mono) -> torch.Tensor:
        """Return drawings (B, 4, h, h) as numbers from 0 to 1, in changed colours; `mono` ones get a random fill."""
        x = pixels.float().div_(255)
        x[mono, :3] = self.uniform(int(mono.sum()), 3, 1, 1) * 0.6
        x[:, :3] = self.repaint(x[:, :3])
        return x

    def finish(self, x) -> torch.Tensor:
        """Put a ground behind what `draw` returned, and spoil some of the pictures (B, 3, size, size)."""
        ground = torch.where(self.uniform(self.B, 1) < 1 - 0.65 * self.k, 1.0, self.uniform(self.B, 3))
        return self.spoil(x[:, :3].addcmul(ground[:, :, None, None], 1 - x[:, 3:]))

    def repaint(self, colour) -> torch.Tensor:
        """Return the colours (B, 3, h, h) with random channel mixing, brightness, contrast and gamma.

        Some drawings become grey, some become negatives.
        """
        mix = torch.eye(3) + (self.uniform(self.B, 3, 3) - 0.5) * 0.5 * self.k
        mix[self.chosen(0.10)] = 1 / 3
        mix = mix / mix.sum(2, keepdim=True) * torch.exp(self.normal(0.12))[:, None, None]
        flat = torch.baddbmm(self.normal(0.06)[:, None, None], mix, colour.flatten(2))  # (B, 3, h * h)
        flat = flat.clamp_(1e-3, 1).log_().mul_(torch.exp(self.normal(0.25))[:, None, None]).exp_()
        negative = self.chosen(0.05)
        flat[negative] = 1 - flat[negative]
        return flat.view_as(colour)

    def move(self, x) -> torch.Tensor:
        """Shift, scale, stretch, rotate and shear drawings (B, 4, h, h); return (B, 4, size, size)."""
        scale, aspect = torch.exp(self.normal(0.12) + 0.05 * self.k) * 1.12, torch.exp(self.normal(0.10))
        tilt, shear = self.normal(0.15), self.normal(0.12)
        c, s = torch.cos(tilt), torch.sin(tilt)
        first = torch.stack([scale * aspect * c, scale * (shear - s), self.normal(0.10)], 1)
        second = torch.stack([scale * s, scale / aspect * c, self.normal(0.10)], 1)
        grid = F.affine_grid(torch.stack([first, second], 1), (self.B, 4, self.size, self.size), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    def outline(self, x) -> None:
        """Draw a dark line along the edge of some drawings (B, 4, size, size), in place.

        The line reaches 1/64 of the picture's side to both sides of the edge.
        """
        rows = self.chosen(0.3)
        if len(rows) == 0:
            return
        wide = max(1, self.size // 64) * 2 + 1
        alpha = x[rows, 3:].clamp(0, 1)
        outer = grow(alpha, wide // 2)
        edge = (outer + grow(-alpha, wide // 2)).clamp(0, 1)
        ink = self.uniform(len(rows), 3, 1, 1) * 0.3
        x[rows] = torch.cat([x[rows, :3] * (1 - edge) + ink * edge, outer], 1)

    def spoil(self, y) -> torch.Tensor:
        """Return the pictures, some of them blurred, some with a covered rectangle, some with noise."""
        rows, wide = self.chosen(0.3), self.size // 64 * 2 + 1
        if len(rows):
            half = wide // 2
            across = F.avg_pool2d(y[rows], (1, wide), 1, (0, half), count_include_pad=False)
            y[rows] = F.avg_pool2d(across, (wide, 1), 1, (half, 0), count_include_pad=False)
        for i in self.chosen(0.3).tolist():
            side, top, left = self.uniform(3).tolist()
            side = int(self.size * (0.1 + 0.2 * side))
            top, left = int(top * (self.size - side)), int(left * (self.size - side))
            y[i, :, top : top + side, left : left + side] = self.uniform(3, 1, 1)
        rows = self.chosen(0.5)
        if len(rows):
            noise = torch.randn(len(rows), *y.shape[1:], generator=self.generator)
            y[rows] += noise * 0.03 * self.k
        return y.clamp_(0, 1)
