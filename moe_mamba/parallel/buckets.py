"""What DeepSpeed's buffers hold at most, in elements: constants of the engine that planning counts with, too."""

BUCKET = 2**26  # gradients that travel together; a buffer of as many lies on the device, or two on a GPU
WHOLE_BUCKET = (
    500_000_000  # the same without ZeRO, where DeepSpeed copies gradients together once a step; not ours to set
)
PERSISTENT = 10_000  # parameters of at most as many stay gathered between steps under ZeRO-3: norms, biases
LIVE = 1_000_000_000  # of ZeRO-3's gathered parameters that stay for their next use, if that is as near


def reduces_beside_backward(stage: int, device: str, ranks: int, largest: int) -> bool:
    """Whether ZeRO reduces a full bucket of gradients while the backward pass goes on, on a stream of its own.

    A CPU has no streams, and one rank has nobody to reduce with: DeepSpeed would only wait for it. With gloo
    nothing would run beside the backward pass, and a bucket would be what hooks have filled it with, in their order;
    without, sums have the order of the parameters. A gradient that fits in no bucket would be freed, at ZeRO 1 and 2,
    while that stream still reads it: DeepSpeed notes it with the allocator only where it offloads.

    Args:
        stage: of ZeRO.
        device: type of the device, such as ``cuda``.
        ranks: in the world.
        largest: elements of the largest parameter of a rank.
    """
    if device == "cpu" or ranks == 1 or stage == 0:
        return False
    return stage == 3 or largest <= BUCKET
