"""The books' way in the speed comparison is the books' way: the same images, and a model that learns."""

import torch

import fmnist.data
from bench import books
from fmnist.train import Split


def test_an_item_is_the_image_that_our_batch_has() -> None:
    dataset = fmnist.data.load("sample")
    items = books.Images(dataset.train_images, dataset.train_labels)
    pixels, labels = Split(torch.tensor(dataset.train_images), torch.tensor(dataset.train_labels)).batch(slice(0, 20))
    for i in range(20):
        image, label = items[i]
        assert image.shape == (1, 28, 28) and image.dtype == torch.float32
        assert torch.equal(image.flatten(), pixels[i]) and label == labels[i]


def test_the_books_way_learns() -> None:
    seconds, accuracy = books.books(fmnist.data.load("sample"), epochs=2, workers=0)
    assert accuracy > 0.5 and seconds > 0
