"""ResNet-56, trained elsewhere on the original CIFAR-10, adapted to its JPEG copy."""

from bench.tasks import Task
from pliant.data import Train

TASK = Task(
    name="resnet56-cifar10",
    network="resnet56",
    weights="resnet56-cifar10.safetensors",
    prepare=Train(epochs=0.5, lr=0.02, batch=128, precision="bf16-mixed"),
)
