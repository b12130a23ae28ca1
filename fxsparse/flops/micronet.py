"""The `micronet` convention: FLOPs as the paper's own notebooks count them.

Source: `micronet_challenge/counting.py` in google-research/google-research, as called by `get_stats` in
`rigl/sparse_utils.py` and the notebooks in `rigl/imagenet_resnet/colabs` of google-research/rigl. It counts
convolutions and linears only:

- A dot product of n terms is n multiplications and n - 1 additions; n is the *fraction* of the weights that
  are kept, not rounded to whole weights.
- Every layer has a bias (one addition per output) and a ReLU (one multiplication per output), the classifier
  too, whether or not the model does.
- Output sizes are computed again, with padding of half a kernel on either side, from the layer's input size.
  Where Keras pads in a layer of its own (the stem, and strided depthwise convolutions), that input size is
  already padded, so the output comes out one larger than it is.
- A depthwise convolution is taken for a plain one with as many inputs as channels and a single output: its
  products are right, its bias, ReLU and saved additions are counted for one channel.
"""

from math import ceil, prod

from ..core.node_cost import NodeCost


def micronet_flops(node: NodeCost, density: float, first: bool) -> float:
    """Multiplications plus additions of one call; 0 for anything but a convolution or linear.

    Args:
        node: the call.
        density: fraction of the weight that is kept.
        first: whether this is the model's first convolution, whose padding is counted twice.
    """
    if node.weight_shape is None or node.input_shape is None or node.output_shape is None:
        return 0.0
    out, terms = node.weight_shape[0], prod(node.weight_shape[1:])
    if node.operation == "linear":
        return prod(node.input_shape[:-1]) * out * _per_output(terms * density)
    if not node.operation.startswith("conv") or "transpose" in node.operation:
        return 0.0
    kernel = node.weight_shape[2:]
    rank = len(kernel)
    channels_in = node.input_shape[-rank - 1]
    depthwise = node.weight_shape[1] == 1 and channels_in == out and out > 1
    sizes = node.output_shape[-rank:]
    if max(node.stride) > 1 and (first or depthwise):
        sizes = tuple(
            ceil((size + max(k - stride, 0) - k + 1 + 2 * (k // 2)) / stride)
            for size, k, stride in zip(node.input_shape[-rank:], kernel, node.stride, strict=True)
        )
    places = prod(sizes) * (node.output_shape[0] if len(node.output_shape) == rank + 2 else 1)
    if depthwise:
        return places * _per_output(prod(kernel) * channels_in * density)
    return places * out * _per_output(terms * density)


def _per_output(terms: float) -> float:
    """n multiplications, n - 1 additions, the bias, the ReLU."""
    return terms + (terms - 1) + 1 + 1
