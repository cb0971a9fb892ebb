"""How close a student comes to its teacher, and to real images, at each number of steps."""
