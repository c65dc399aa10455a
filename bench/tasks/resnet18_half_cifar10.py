"""ResNet-18 of half the width, trained here from scratch on CIFAR-10 JPEG."""

from bench.tasks import Task
from pliant.data import Train

TASK = Task(
    name="resnet18-half-cifar10",
    network="resnet18-cifar-half",
    prepare=Train(epochs=4, lr=0.05, batch=128, precision="bf16-mixed"),
)
