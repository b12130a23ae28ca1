"""Operations as plain loops over numbers that count their own multiplications.

Every function gives the result and the number of products; the tests compare the result with PyTorch's, so a
loop that forgets or invents a product is found out.
"""

from itertools import product

import numpy as np
import torch
import torch.nn.functional as F


def numbers(tensor):
    return tensor.detach().double().numpy()


def matrix_product(a, b):
    """(n, k) by (k, m)."""
    (n, inner), m = a.shape, b.shape[1]
    out, count = np.zeros((n, m)), 0
    for i, j, k in product(range(n), range(m), range(inner)):
        out[i, j] += a[i, k] * b[k, j]
        count += 1
    return out, count


def broadcast_matmul(a, b):
    """All forms of `matmul`."""
    wide_a, wide_b = (a[None] if a.ndim == 1 else a), (b[:, None] if b.ndim == 1 else b)
    batch = np.broadcast_shapes(wide_a.shape[:-2], wide_b.shape[:-2])
    all_a = np.broadcast_to(wide_a, batch + wide_a.shape[-2:])
    all_b = np.broadcast_to(wide_b, batch + wide_b.shape[-2:])
    out, count = np.zeros((*batch, wide_a.shape[-2], wide_b.shape[-1])), 0
    for index in np.ndindex(*batch):
        out[index], products = matrix_product(all_a[index], all_b[index])
        count += products
    if a.ndim == 1:
        out = out[..., 0, :]
    if b.ndim == 1:
        out = out[..., 0]
    return out, count


def einsum_pair(equation, a, b):
    """Two operands: one product for every combination of the indices."""
    left, output = equation.split("->")
    terms = left.split(",")
    sizes = {}
    for term, operand in zip(terms, (a, b), strict=True):
        sizes |= dict(zip(term, operand.shape, strict=True))
    out, count = np.zeros([sizes[label] for label in output]), 0
    for values in product(*(range(size) for size in sizes.values())):
        at = dict(zip(sizes, values, strict=True))
        factors = [op[tuple(at[x] for x in term)] for term, op in zip(terms, (a, b), strict=True)]
        out[tuple(at[x] for x in output)] += factors[0] * factors[1]
        count += 1
    return out, count


def linear(x, weight, bias=None):
    rows = x.reshape(-1, x.shape[-1])
    out, count = matrix_product(rows, weight.T)
    out = out.reshape(*x.shape[:-1], weight.shape[0])
    return out + (0 if bias is None else bias), count


def bilinear(x, y, weight, bias):
    """The products with the weight's elements; `x_i y_j` is made on the way and not counted, as a factor."""
    out, count = np.zeros((len(x), weight.shape[0])), 0
    for row, o, i, j in product(range(len(x)), *map(range, weight.shape)):
        out[row, o] += weight[o, i, j] * (x[row, i] * y[row, j])
        count += 1
    return out + bias, count


def convolution(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Any number of dimensions; `padding` zeros on either side, which are multiplied like all others."""
    rank = weight.ndim - 2
    stride, padding, dilation = (v if isinstance(v, tuple) else (v,) * rank for v in (stride, padding, dilation))
    unbatched = x.ndim == rank + 1
    x = np.pad(x[None] if unbatched else x, [(0, 0), (0, 0), *((p, p) for p in padding)])
    kernel = weight.shape[2:]
    spans = zip(x.shape[2:], kernel, stride, dilation, strict=True)
    sizes = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in spans]
    out, count = np.zeros((x.shape[0], weight.shape[0], *sizes)), 0
    outputs_per_group = weight.shape[0] // groups
    for n, o, *place in product(range(x.shape[0]), range(weight.shape[0]), *map(range, sizes)):
        first = o // outputs_per_group * weight.shape[1]
        for c, *tap in product(range(weight.shape[1]), *map(range, kernel)):
            at = tuple(p * s + t * d for p, s, t, d in zip(place, stride, tap, dilation, strict=True))
            out[(n, o, *place)] += weight[(o, c, *tap)] * x[(n, first + c, *at)]
            count += 1
    out = out + (0 if bias is None else bias.reshape(-1, *[1] * rank))
    return (out[0] if unbatched else out), count


def transposed_convolution(x, weight, bias=None, stride=1, padding=0, output_padding=0, dilation=1, groups=1):
    """Every input position meets every weight of its channel, also where the result is cropped."""
    rank = weight.ndim - 2
    kernel, inputs_per_group = weight.shape[2:], weight.shape[0] // groups
    full = [(size - 1) * stride + dilation * (k - 1) + 1 for size, k in zip(x.shape[2:], kernel, strict=True)]
    out = np.zeros((x.shape[0], weight.shape[1] * groups, *(size + output_padding for size in full)))
    count = 0
    for n, c, *place in product(range(x.shape[0]), range(x.shape[1]), *map(range, x.shape[2:])):
        first = c // inputs_per_group * weight.shape[1]
        for o, *tap in product(range(weight.shape[1]), *map(range, kernel)):
            at = tuple(p * stride + t * dilation for p, t in zip(place, tap, strict=True))
            out[(n, first + o, *at)] += weight[(c, o, *tap)] * x[(n, c, *place)]
            count += 1
    crop = tuple(slice(padding, size - padding) for size in out.shape[2:])
    out = out[(slice(None), slice(None), *crop)]
    return out + (0 if bias is None else bias.reshape(-1, *[1] * rank)), count


def deformable_convolution(x, offset, weight, mask=None, padding=0):
    """Stride 1: the taps of a plain convolution, each at its own fractional place."""
    out_channels, in_channels, height, width = weight.shape
    rows, columns = offset.shape[2:]
    out, count = np.zeros((len(x), out_channels, rows, columns)), 0

    def sample(image, y, x):
        low_y, low_x = int(np.floor(y)), int(np.floor(x))
        total = 0.0
        for yy, xx in product((low_y, low_y + 1), (low_x, low_x + 1)):
            if 0 <= yy < image.shape[0] and 0 <= xx < image.shape[1]:
                total += image[yy, xx] * (1 - abs(y - yy)) * (1 - abs(x - xx))
        return total

    for n, r, c, ky, kx in product(range(len(x)), range(rows), range(columns), range(height), range(width)):
        tap = ky * width + kx
        y = r - padding + ky + offset[n, 2 * tap, r, c]
        z = c - padding + kx + offset[n, 2 * tap + 1, r, c]
        for i in range(in_channels):
            value = sample(x[n, i], y, z) * (1 if mask is None else mask[n, tap, r, c])
            for o in range(out_channels):
                out[n, o, r, c] += weight[o, i, ky, kx] * value
                count += 1
    return out, count


def attention(query, key, value, mask=None, causal=False):
    """(B, H, L, E), (B, G, S, E), (B, G, S, V), with H a multiple of G; all scores are computed."""
    batch, heads, length, features = query.shape
    group = heads // key.shape[1]
    out, count = np.zeros((batch, heads, length, value.shape[-1])), 0
    for b, h in np.ndindex(batch, heads):
        scores, products = matrix_product(query[b, h], key[b, h // group].T)
        count += products
        scores = scores / np.sqrt(features)
        if mask is not None:
            scores = scores + np.broadcast_to(mask, (batch, heads, *scores.shape))[b, h]
        if causal:
            scores = np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[b, h], products = matrix_product(weights / weights.sum(-1, keepdims=True), value[b, h // group])
        count += products
    return out, count


def multihead_attention(module, query, key, value):
    """Batch first; three projections, attention a head, one projection back."""
    width, heads = module.embed_dim, module.num_heads
    if module.in_proj_weight is not None:
        weights = np.split(numbers(module.in_proj_weight), 3)
    else:
        weights = [numbers(w) for w in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)]
    biases = np.split(numbers(module.in_proj_bias), 3)
    projected, total = [], 0
    for x, weight, bias in zip((query, key, value), weights, biases, strict=True):
        out, count = linear(x, weight, bias)
        total += count
        projected.append(out.reshape(*out.shape[:2], heads, width // heads).transpose(0, 2, 1, 3))
    out, count = attention(*projected)
    total += count
    out = out.transpose(0, 2, 1, 3).reshape(len(query), -1, width)
    out, count = linear(out, numbers(module.out_proj.weight), numbers(module.out_proj.bias))
    return out, total + count


def recurrent(module, x):
    """`nn.RNN`, `nn.GRU`, `nn.LSTM`, not batch first, from zero states: layers, directions, projections."""
    kind = type(module).__name__
    directions, total = 2 if module.bidirectional else 1, 0
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"l{layer}{'_reverse' if direction else ''}"
            get = lambda name, suffix=suffix: numbers(getattr(module, f"{name}_{suffix}"))  # noqa: E731
            hidden = np.zeros((x.shape[1], module.proj_size or module.hidden_size))
            cell = np.zeros((x.shape[1], module.hidden_size))
            steps = []
            for t in reversed(range(len(x))) if direction else range(len(x)):
                a, first = linear(x[t], get("weight_ih"), get("bias_ih"))
                b, second = linear(hidden, get("weight_hh"), get("bias_hh"))
                hidden, cell = CELLS[kind](a, b, hidden, cell)
                total += first + second
                if module.proj_size:
                    hidden, third = linear(hidden, get("weight_hr"))
                    total += third
                steps.append(hidden)
            outputs.append(np.stack(steps[::-1] if direction else steps))
        x = np.concatenate(outputs, -1)
    return x, total


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _rnn(a, b, hidden, cell):
    return np.tanh(a + b), cell


def _gru(a, b, hidden, cell):
    (ra, za, na), (rb, zb, nb) = np.split(a, 3, -1), np.split(b, 3, -1)
    r, z = _sigmoid(ra + rb), _sigmoid(za + zb)
    n = np.tanh(na + r * nb)
    return (1 - z) * n + z * hidden, cell


def _lstm(a, b, hidden, cell):
    i, f, g, o = np.split(a + b, 4, -1)
    cell = _sigmoid(f) * cell + _sigmoid(i) * np.tanh(g)
    return _sigmoid(o) * np.tanh(cell), cell


CELLS = {"RNN": _rnn, "GRU": _gru, "LSTM": _lstm}


def padded(x, padding, mode):
    """What a convolution of this padding mode sees."""
    rank = x.ndim - 2
    return numbers(F.pad(torch.from_numpy(x), [padding] * 2 * rank, mode=mode))
