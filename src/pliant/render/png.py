"""Pictures from numbers: PNG files without a library, and colours for and against."""

import struct
import zlib
from base64 import b64encode

import torch
from torch import Tensor

AGAINST, FOR = (59.0, 130.0, 214.0), (221.0, 107.0, 32.0)  # the blue and the orange of figures


def png(pixels: Tensor) -> bytes:
    """Write a picture as a PNG file.

    Args:
        pixels: (height, width, 3 or 4), uint8: red, green, blue, and how much covers what is below.
    """
    height, width, channels = pixels.shape
    kind = {3: 2, 4: 6}[channels]
    rows = torch.cat([pixels.new_zeros(height, 1), pixels.reshape(height, -1)], 1)
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    packed = zlib.compress(bytes(rows.contiguous().cpu().numpy().tobytes()), 9)
    parts = (b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)


def link(pixels: Tensor) -> str:
    """Return a picture as the source of an image in a page."""
    return f"data:image/png;base64,{b64encode(png(pixels)).decode()}"


def picture(image: Tensor) -> Tensor:
    """Bring an image into colours between its darkest and its brightest number.

    Args:
        image: (channels, height, width), in any scale; three channels are colours, of others the
            mean is shown in grey.

    Returns:
        (height, width, 3), uint8.
    """
    colours = image if len(image) == 3 else image.float().mean(0, keepdim=True).expand(3, -1, -1)
    low, high = colours.min(), colours.max()
    share = (colours - low).float() / (high - low).clamp_min(1e-12).float()
    return (255 * share).round().to(torch.uint8).permute(1, 2, 0)


def heat(values: Tensor, top: float) -> Tensor:
    """Colour numbers: orange above zero, blue below, and clear where they are small.

    Args:
        values: (rows, columns).
        top: what is covered wholly.

    Returns:
        (rows, columns, 4), uint8.
    """
    share = (values.float() / (top or 1.0)).clamp(-1, 1)
    tint = torch.where(share[..., None] > 0, torch.tensor(FOR), torch.tensor(AGAINST))
    cover = 255 * share.abs()[..., None].sqrt()
    return torch.cat([tint, cover], 2).round().to(torch.uint8)


def _chunk(name: bytes, data: bytes) -> bytes:
    check = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)
