"""ResNet-20 with random weights, and CIFAR-10 JPEG."""

from bench.tasks import Task
from pliant.data import Train

TASK = Task(
    name="resnet20-scratch",
    network="resnet20",
    prepare=Train(epochs=0, batch=128),
)
