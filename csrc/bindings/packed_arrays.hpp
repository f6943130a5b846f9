/// Packed results of the core as numpy arrays that own their memory.
#pragma once

#include <pybind11/numpy.h>

#include <cstdlib>

#include "tokenize/packed_writer.hpp"

namespace scfm {

template <class Value>
pybind11::array_t<Value> adopt(MallocArray<Value> array) {
  Value* memory = array.memory.release();
  const pybind11::capsule owner(memory, [](void* pointer) { std::free(pointer); });
  return pybind11::array_t<Value>(static_cast<pybind11::ssize_t>(array.size), memory, owner);
}

}  // namespace scfm
