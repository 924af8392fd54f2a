"""The promises of the feature network: any image shape, features of one size, digits told apart."""

from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits

from nfm.trainers.checkpoint import pack_weights, unpack_weights
from nfm.trainers.loop import Recipe, train
from nfm.trainers.models.cnn import FeatureNet, classification_loss


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (4, 9, 15)])
def test_features_have_one_size_for_any_image_shape(image_shape):
    model = FeatureNet(image_shape, classes=7).eval()
    images = torch.rand(5, *image_shape) * 2 - 1
    with torch.no_grad():
        features, logits = model.features(images), model(images)
    assert features.shape == (5, 128)
    assert (features >= 0).all()
    assert logits.shape == (5, 7)
    torch.testing.assert_close(model.head(features), logits)


def test_images_too_small_are_refused():
    with pytest.raises(ValueError, match="1x7x8"):
        FeatureNet((1, 7, 8), classes=2)


def test_weights_and_architecture_build_the_same_network_again():
    model = FeatureNet((1, 8, 8), classes=3, width=8, feature_size=32).eval()
    state, architecture = unpack_weights(pack_weights(model, model.architecture))
    again = FeatureNet(**architecture).eval()
    again.load_state_dict(state)
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(again(images), model(images))


def test_it_tells_held_out_digits_apart():
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(digits.target)
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    training, held_out = rows[:1500], rows[1500:]

    def batches():
        random = torch.Generator().manual_seed(1)
        while True:
            for chosen in training[torch.randperm(1500, generator=random)].split(100):
                yield SimpleNamespace(image=images[chosen], label=labels[chosen])

    torch.manual_seed(0)
    recipe = Recipe(examples=12_000, batch_size=100, learning_rate=3e-3, warmup_examples=1200, ema=0.98)
    trained = train(FeatureNet((1, 8, 8), classes=10), classification_loss, batches(), recipe)
    with torch.no_grad():
        guesses = trained.ema(images[held_out]).argmax(dim=1)
    assert (guesses == labels[held_out]).float().mean() >= 0.97
