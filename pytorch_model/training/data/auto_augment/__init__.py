"""AutoAugment and RandAugment as AutoML has them: pixels, boxes, operations, policies."""
