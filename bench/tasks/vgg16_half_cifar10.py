"""VGG-16-BN of half the width, trained here from scratch on CIFAR-10 JPEG."""

from bench.tasks import Task
from pliant.data import Train

TASK = Task(
    name="vgg16-half-cifar10",
    network="vgg16-bn-half",
    prepare=Train(epochs=12, lr=0.05, batch=128, precision="bf16-mixed"),
)
