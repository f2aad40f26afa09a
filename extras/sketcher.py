"""The sketcher: a small generator that draws a hidden block from its predicted representation.

It is given the prediction, averaged over the block, and the block's place and size, and never the
context (paper section 8 and appendix E, whose decoder, a diffusion model, was not released).
extras/sketches.py is the command, and what sketches show.

It generates by flow matching: a pixel x_t lies on the line from noise (t = 0) to the image (t = 1),
the sketcher is trained to say the velocity, image minus noise, and to draw is to follow it from
pure noise in small steps. One single step of length 1 gives the mean of all possible blocks: a
blur, which is what a decoder without noise would answer.

Controls go through the same network, each kind of condition by an input layer of its own: the true
target feature, untrained answers, and nothing but the block's place. Notation as in models.py; S
sketches, P = C*p*p numbers in a patch, M = 1 block.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import evaluate
import train
from config import UsageError
from masking import MultiBlockMasking
from models import patchify, sincos_positions, take
from predict_and_visualize import unpatchify
from support import checkpoint

SAVE_EVERY = 100  # steps


def normed(x):
    """RMSNorm of each pixel's vector, then SiLU: [B, K, H, W]. Unlike a group norm it uses no other
    pixel, so padding changes nothing."""
    return F.silu(x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt())


class ConvBlock(nn.Module):
    """A 1 x 1 convolution of x, plus two 3 x 3 convolutions: [B, K, H, W] -> [B, K', H, W].

    told [B, D], what to draw, scales and shifts the features between the two. inside [B, 1, H, W]:
    1 in the block, 0 in padding, so the 3 x 3 convolutions read zeros there.
    """

    def __init__(self, inputs, outputs, told):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.tell = nn.Linear(told, 2 * outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.around = nn.Conv2d(inputs, outputs, 1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x, told, inside):
        scale, shift = self.tell(told)[:, :, None, None].chunk(2, dim=1)
        y = self.first(normed(x) * inside)
        y = self.second(normed(y * (1 + scale) + shift) * inside)
        return self.around(x) + y


class Sketcher(nn.Module):
    """The velocity of a hidden block's pixels at time t, given a condition: a small U-Net.

    numbers: how many a condition of each kind has, a dict; grid: the encoder's; width: of the
    pixels' vectors, doubled each time that the sides of the block are halved.
    """

    def __init__(self, numbers, grid, patch_size=4, channels=3, width=32, told=128):
        super().__init__()
        self.grid, self.patch_size, self.channels = tuple(grid), patch_size, channels
        self.conditions = nn.ModuleDict({kind: nn.Sequential(
            nn.BatchNorm1d(K, affine=False), nn.Linear(K, told)) for kind, K in numbers.items()})
        self.clock = nn.Sequential(nn.Linear(1, told), nn.GELU(), nn.Linear(told, told))
        self.register_buffer("positions", sincos_positions(grid, told), persistent=False)
        self.place = nn.Linear(told, told)
        halvings = next(n for n in (2, 1, 0) if patch_size % 2**n == 0)  # so that any block fits
        sizes = [width * 2**n for n in range(halvings + 1)]
        self.start = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(ConvBlock(size, size, told) for size in sizes)
        self.shrink = nn.ModuleList(nn.Conv2d(size, 2 * size, 2, stride=2) for size in sizes[:-1])
        self.grow = nn.ModuleList(nn.ConvTranspose2d(2 * size, size, 2, stride=2)
                                  for size in sizes[:-1])
        self.up = nn.ModuleList(ConvBlock(2 * size, size, told) for size in sizes[:-1])
        self.finish = nn.Conv2d(width, channels, 3, padding=1)

    def read(self, conditions):
        """Conditions, a dict of kind -> [B, K], as vectors of one width: [kinds * B, D]."""
        return torch.cat([self.conditions[kind](x) for kind, x in conditions.items()])

    def forward(self, x, t, condition, masks):
        """Patches x [B, Nt, P] at times t [B, 1], a condition [B, D] as read -> [B, Nt, P]."""
        valid = masks.targets_valid[:, 0]  # [B, Nt]
        places = pool(self.positions[masks.targets[:, 0]], masks)  # [B, D]
        cells, (rows, columns) = lay_out(masks, self.grid)  # [B, Nt]
        image = torch.arange(len(x), device=x.device)[:, None].expand_as(cells)  # [B, Nt]
        canvas = x.new_zeros(len(x), rows * columns, x.shape[2] + 1)  # [B, cells, P + 1]
        canvas[image[valid], cells[valid]] = F.pad(x[valid], (0, 1), value=1.0)
        p, inside = self.patch_size, canvas[..., -1].unflatten(1, (1, rows, columns))
        inside = inside.repeat_interleave(p, 2).repeat_interleave(p, 3)  # [B, 1, H, W]
        pixels = unpatchify(canvas[..., :-1], (self.channels, rows * p, columns * p), p)
        pixels = self.velocity(pixels, t, condition, places, inside)  # [B, C, H, W]
        return take(patchify(pixels, p), cells)  # [B, Nt, P]

    def velocity(self, x, t, condition, places, inside):
        """The same for pixels [B, C, H, W] of blocks that lie at the canvas's upper left corner;
        places [B, D]: the mean position of their patches."""
        told = condition + self.clock(t) + self.place(places)  # [B, D]
        insides = [inside]
        for _ in self.shrink:
            insides.append(insides[-1][..., ::2, ::2])  # [B, 1, H/2, W/2], [B, 1, H/4, W/4]
        x, kept = self.start(x), []
        for n, shrink in enumerate(self.shrink):
            kept.append(self.down[n](x, told, insides[n]))
            x = shrink(kept[n])  # [B, 2 * width, H/2, W/2], [B, 4 * width, H/4, W/4]
        x = self.down[-1](x, told, insides[-1])
        for n in reversed(range(len(self.grow))):
            x = self.up[n](torch.cat([self.grow[n](x), kept[n]], dim=1), told, insides[n])
        return self.finish(normed(x) * inside)  # [B, C, H, W]


def lay_out(masks, grid):
    """Each patch's cell on a canvas as large as the largest block: int64 [B, Nt], and the canvas's
    rows and columns, in patches. Padding is in cell 0."""
    places, valid = masks.targets[:, 0], masks.targets_valid[:, 0]  # [B, Nt]

    def from_first(line):
        return (line - line.masked_fill(~valid, max(grid)).amin(1, keepdim=True)) * valid

    rows, columns = from_first(places // grid[1]), from_first(places % grid[1])  # [B, Nt] each
    sides = int(rows.max()) + 1, int(columns.max()) + 1
    return rows * sides[1] + columns, sides


def flow_loss(sketcher, patches, condition, masks, generator):
    """Mean squared error of the velocity at a random time, over the real patches of each block."""
    t = torch.rand(len(patches), 1, generator=generator).to(patches)  # [B, 1]
    noise = torch.randn(patches.shape, generator=generator).to(patches)  # [B, Nt, P]
    x = torch.lerp(noise, patches, t[..., None])  # [B, Nt, P]
    error = (sketcher(x, t, condition, masks).float() - (patches - noise)).square().mean(-1)
    return (error * masks.targets_valid[:, 0]).sum(1) / masks.targets_valid[:, 0].sum(1)  # [B]


@torch.no_grad()
def draw(sketcher, condition, masks, count, steps=32, seed=0):
    """Sketches of hidden blocks: [B, count, Nt, P]; with steps=1 the mean of all possible ones."""
    rows = torch.arange(len(condition), device=condition.device).repeat_interleave(count)
    condition, masks = condition[rows], masks[rows]
    shape = (*masks.targets[:, 0].shape, sketcher.channels * sketcher.patch_size**2)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(condition)
    for step in range(steps):  # x [B*S, Nt, P]
        t = torch.full_like(x[:, 0, :1], step / steps)  # [B*S, 1]
        x = x + sketcher(x, t, condition, masks) / steps
    return x.unflatten(0, (-1, count))


def paste(images, masks, patches):
    """Images [B, C, H, W] with their block replaced by patches [B, S, Nt, P] -> [B, S, C, H, W]."""
    B, S, _, P = patches.shape
    p = math.isqrt(P // images.shape[1])
    rows = torch.arange(B * S, device=images.device)[:, None]  # [B*S, 1]
    masks = masks[rows[:, 0] // S]
    real = masks.targets_valid[:, 0]  # [B*S, Nt]
    canvas = patchify(images, p).repeat_interleave(S, 0)  # [B*S, N, P]
    canvas[rows.expand_as(real)[real], masks.targets[:, 0][real]] = patches.flatten(0, 1)[real]
    return unpatchify(canvas, images.shape[1:], p).unflatten(0, (B, S))


# --- conditions -----------------------------------------------------------------------------------


def pool(tokens, masks):
    """The mean over the block's patches: [B, Nt, D] -> [B, D]."""
    valid = masks.targets_valid[:, 0, :, None]  # [B, Nt, 1]
    return (tokens * valid).sum(1) / valid.sum(1)


def block_feature(tokens, masks):
    """The block's feature among tokens of the whole image [B, N, D] -> [B, D]."""
    return pool(take(F.layer_norm(tokens, tokens.shape[-1:]), masks.targets[:, 0]), masks)


class Subject:
    """A run whose predictor is to be sketched: its model, images, and a sampler of one block.

    mae: a MAE's run, for one more kind of condition; kinds: of conditions, if not all.
    """

    def __init__(self, folder, mae="", device="cpu", kinds=None):
        self.model, masking, config, about = train.load_run(folder, device)
        self.untrained = train.build(config, about["channels"])[0].to(device).eval()
        self.mae = evaluate.load_encoders(mae, device)[0]["target"] if mae else None
        self.masking = MultiBlockMasking(masking.grid, 1, config.target_scale, config.target_aspect,
                                         context_scale=(1.0, 1.0))  # all else is context
        self.dataset = data.load(config.dataset, config.split, config.data_dir, config.image_size)
        self.kept, self.held = train.hold_out(config, len(self.dataset))
        self.config, self.device, self.kinds = config, torch.device(device), kinds
        self.folder = Path(folder)

    def images(self, numbers):
        """Normalized images, without crop or flip: float [B, C, H, W]."""
        size = self.config.image_size
        return torch.cat(list(data.batches(self.dataset, 256, size, self.device, numbers)))

    def autocast(self):
        """A context in which the run's precision is used."""
        precision = train.pick_precision(self.config, self.device)
        return torch.autocast(self.device.type, precision, enabled=precision != torch.float32)

    def masks(self, B, generator):
        """Masks of one block for B images."""
        return self.masking(B, generator).to(self.device)

    @torch.no_grad()
    def conditions(self, images, masks):
        """What a block may be sketched from: a dict of kind -> [B, K]."""
        context, untrained = (
            part.context_encoder(images, masks.context, masks.context_valid)  # [B, Nc, D]
            for part in (self.model, self.untrained))
        answers = {"predicted": self.model.predictor(context, masks),
                   "untrained predictor": self.untrained.predictor(context, masks),
                   "untrained": self.untrained.predictor(untrained, masks)}  # each [B, 1, Nt, D]
        found = {kind: pool(answer[:, 0], masks) for kind, answer in answers.items()}
        found["true"] = block_feature(self.model.target_encoder(images), masks)
        found["place only"] = images.new_zeros(len(images), 1)
        if self.mae is not None:
            found["MAE"] = block_feature(self.mae(images), masks)
        return {kind: found[kind] for kind in self.kinds or found}


# --- training -------------------------------------------------------------------------------------


def build(subject, width=32, seed=0):
    """A Sketcher for the run, as it is before training."""
    torch.manual_seed(seed)
    images = subject.images(subject.kept[:2])
    found = subject.conditions(images, subject.masks(2, torch.Generator().manual_seed(seed)))
    numbers = {kind: x.shape[1] for kind, x in found.items()}
    encoder = subject.model.target_encoder
    return Sketcher(numbers, encoder.grid, encoder.patch_size, images.shape[1],
                    width).to(subject.device)


def load(path, encoder, channels):
    """The Sketcher in a file that `fit` wrote, for the Encoder of the same run."""
    state = checkpoint.read(path)
    numbers = {name.split(".")[1]: weight.shape[1] for name, weight in state["sketcher"].items()
               if name.startswith("conditions.") and weight.ndim == 2}
    sketcher = Sketcher(numbers, encoder.grid, encoder.patch_size, channels,
                        state["settings"]["width"])
    sketcher.load_state_dict(state["sketcher"])
    return sketcher.eval()


def fit(sketcher, subject, settings, path, batch_size=48, lr=2e-3):
    """Train the Sketcher, or finish what `path` holds; it is written now and then."""
    optimizer = torch.optim.AdamW(sketcher.parameters(), lr=lr, betas=(0.9, 0.99))
    generator, steps, start = torch.Generator().manual_seed(settings["seed"]), settings["steps"], 0

    def save(step, **more):
        state = {"settings": settings, "step": step, "sketcher": sketcher.state_dict(), **more}
        checkpoint.write(path, lambda temporary: torch.save(state, temporary))

    if path.exists():
        state = checkpoint.read(path)
        if state["settings"] != settings:
            raise UsageError(f"{path} was trained with other settings, {state['settings']}: give "
                             "the same, or move it away")
        sketcher.load_state_dict(state["sketcher"])
        start = state["step"]
        if start < steps:
            optimizer.load_state_dict(state["optimizer"])
            generator.set_state(state["generator"])
    bar = tqdm(range(start, steps), "sketcher", steps, initial=start, unit="step")
    for step in bar:
        some = torch.randint(len(subject.kept), (batch_size,), generator=generator)
        images, masks = subject.images(subject.kept[some]), subject.masks(batch_size, generator)
        patches = take(patchify(images, sketcher.patch_size), masks.targets[:, 0])  # [B, Nt, P]
        rate = min(1, (step + 1) / 100) * train.cosine(lr, lr / 100, step / steps)
        optimizer.param_groups[0]["lr"] = rate
        with subject.autocast():
            found = subject.conditions(images, masks)
            rows = torch.arange(len(images), device=images.device).repeat(len(found))  # [kinds * B]
            loss = flow_loss(sketcher, patches[rows], sketcher.read(found), masks[rows], generator)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0:
            losses = zip(found, loss.detach().view(len(found), -1).mean(1).tolist())
            bar.set_postfix_str(", ".join(f"{kind} {value:.3f}" for kind, value in losses))
            save(step + 1, optimizer=optimizer.state_dict(), generator=generator.get_state())
    save(steps)  # the result is the weights alone
    return sketcher.eval()
