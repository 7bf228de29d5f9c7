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
    parts = zip(pixels.split(CHUNK), mono.split(CHUNK))
    return torch.cat([Hand(len(p), size, k, generator).draw(p, m) for p, m in parts])


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
        """Turn drawings (B, 4, h, h) into pictures (B, 3, size, size); `mono` marks drawings of one colour."""
        x = pixels.float().div_(255)
        x[mono, :3] = self.uniform(int(mono.sum()), 3, 1, 1) * 0.6
        x[:, :3] = self.repaint(x[:, :3]) * x[:, 3:]  # multiply by alpha, because `move` interpolates
        x = self.move(x)
        self.outline(x)
        ground = torch.where(self.uniform(self.B, 1) < 1 - 0.65 * self.k, 1.0, self.uniform(self.B, 3))
        y = x[:, :3].addcmul_(ground[:, :, None, None], 1 - x[:, 3:])
        return self.spoil(y)

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
        wide = self.size // 64 * 2 + 1
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
