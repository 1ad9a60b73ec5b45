"""What the package knows of nnU-Net's folders, files and plans."""
