"""The shipped base family, its pretraining, hub models through the same call, and twins of public configs."""
