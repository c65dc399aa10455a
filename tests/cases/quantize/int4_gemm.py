from pliant.testing import Case

CASES = [Case("int4_gemm", spec="int4_gemm(samples=16)")]
