"""What distilling methods share: losses of a teacher, groups of classes, networks that grow."""
