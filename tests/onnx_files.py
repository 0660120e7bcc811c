"""ONNX files for the tests of `specnorm_fx.onnx`, and those of the stock exporter beside them."""

from collections import Counter

import onnx
import torch

from specnorm_fx import transform
from specnorm_fx.onnx.writing import _quiet_exporter
from tests.models import Labelled


def plain_export(model, args, path, **options):
    """The stock exporter on the model without spectral norm."""
    with _quiet_exporter():
        torch.onnx.export(
            model.eval(), args, path, dynamo=True, verbose=False, external_data=False, **options
        )
    return onnx.load(path)


def operators(proto):
    return Counter(node.op_type for node in proto.graph.node)


def trained(make, inputs):
    gm = transform(make(), "*" if make is Labelled else None)
    for _ in range(2):
        gm(*inputs())
    return gm.eval()
