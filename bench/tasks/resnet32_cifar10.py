"""ResNet-32, trained elsewhere on the original CIFAR-10, adapted to its JPEG copy."""

from bench.tasks import Task
from pliant.data import Train

TASK = Task(
    name="resnet32-cifar10",
    network="resnet32",
    weights="resnet32-cifar10.safetensors",
    prepare=Train(epochs=2, lr=0.02, batch=128, precision="bf16-mixed"),
)
