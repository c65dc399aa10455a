"""Bytes in, bytes out: Huffman and ANS codes, address maps, integers of a few bits, the zip."""
