"""Networks that torchvision does not have, and the CIFAR stems of those that it has."""
