"""The model as MLflow serves it: `mlflow.pyfunc.load_model("models:/NAME@champion").predict(images)`.

MLflow stores this file and the package abn with the model, so that it answers without the project.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class AttentionModel(PythonModel):
    """Pictures (n, h, w, 3) uint8 RGB of any size -> a mapping of

    `probabilities` (n, k) float32, `attention_maps` (n, i, j) float32 in 0..1, `classes` (k,) names in their order.
    """

    def load_context(self, context: Any) -> None:
        from abn.model import load_model

        self.model = load_model(context.artifacts["model"])

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> dict[str, Any]:
        import torch

        from abn.data import resize_image

        images = torch.stack([resize_image(image, self.model.size) for image in np.asarray(model_input, np.uint8)])
        with torch.inference_mode():
            output = self.model.network(images.float() / 255)
        return {
            "probabilities": output.logits.softmax(dim=1).numpy(),
            "attention_maps": output.attention_map[:, 0].numpy(),
            "classes": np.array(self.model.classes),
        }


set_model(AttentionModel())
