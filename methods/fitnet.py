"""FitNets (Romero et al., ICLR 2015) in RepDistiller's setting: the student imitates one stage of the teacher."""

import torch
from torch import nn
from torch.nn import functional as F

import options
from methods.base import Constant, Imitation, with_features


class FitNet(Imitation):
    """Cross-entropy, and the mean squared error of one stage's features after a 1x1 convolution on the student's."""

    name = "fitnet"
    reads = "features"

    stage = Constant(2, "stage that is imitated, from 1", options.positive)
    feature_weight = Constant(100.0, "weight of the squared error")

    def prepare(self, model, images, num_images=0):
        with torch.no_grad():
            ours, theirs = (self.chosen(with_features(net, images)) for net in (model, self.teacher))
        self.trained["regressor"] = nn.Conv2d(ours.shape[1], theirs.shape[1], 1)

    def imitation(self, student, teacher, batch):
        imitated, target = self.trained["regressor"](self.chosen(student)), self.chosen(teacher)
        size = min(imitated.shape[-1], target.shape[-1])  # the larger map is averaged down
        imitated, target = (F.adaptive_avg_pool2d(features, size) for features in (imitated, target))
        return {"features": self.feature_weight * F.mse_loss(imitated.float(), target.float())}

    def chosen(self, outputs):
        """Return the features of the chosen stage; ValueError if the network has fewer stages."""
        if self.stage > len(outputs.features):
            raise ValueError(f"stage {self.stage} of a network of {len(outputs.features)} stages")
        return outputs.features[self.stage - 1]
