"""The table of ops as a whole."""

import test_ops_elementwise
import test_ops_gather
import test_ops_linear
import test_ops_shape

from mobile_export.evaluate.ops import MOVES, OPS

APART = {"reshape_like", "quantize", "dequantize"}
"""With tests of their own."""


def test_every_op_has_a_case():
    modules = (test_ops_elementwise, test_ops_gather, test_ops_linear, test_ops_shape)
    assert {case.op for module in modules for case in module.CASES} | APART == set(OPS)


def test_ops_that_move_values_are_known():
    assert set(OPS) >= MOVES
