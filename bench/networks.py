"""Weight shapes of the networks that benchmarks prune."""

Shapes = list[tuple[int, ...]]


def resnet20() -> Shapes:
    """CIFAR-10; 268,336 weights."""
    widths = [16] * 3 + [32] * 3 + [64] * 3
    shapes: Shapes = [(16, 3, 3, 3)]
    before = 16
    for width in widths:
        shapes += [(width, before, 3, 3), (width, width, 3, 3)]
        before = width
    return [*shapes, (10, 64)]


def resnet50() -> Shapes:
    """ImageNet; 25.5 million weights."""
    shapes: Shapes = [(64, 3, 7, 7)]
    before = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            shapes += [(width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, before, 1, 1))
            before = 4 * width
    return [*shapes, (1000, 2048)]


def bert_base() -> Shapes:
    """The encoder; 85 million weights."""
    return [shape for _ in range(12) for shape in [(768, 768)] * 4 + [(3072, 768), (768, 3072)]]
