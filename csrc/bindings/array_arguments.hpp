/// Argument checks of the bindings: a numpy array is taken as it is or refused by name, never converted
/// behind the caller's back and never read out of bounds. Read-only arrays are fine.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <span>
#include <string>
#include <vector>

#include "base/csr_view.hpp"

namespace scfm {

/// The array behind `object`; TypeError or ValueError, naming function and argument, unless it is a numpy
/// array of one dimension, contiguous, aligned and in native byte order.
pybind11::array flat_array(const pybind11::object& object, const char* function, const char* argument);

[[noreturn]] void wrong_dtype(const pybind11::array& array, const char* function, const char* argument,
                              const std::string& expected);

/// A span over such an array of exactly this type. Valid while `object` is held.
template <class Value>
std::span<const Value> array_of(const pybind11::object& object, const char* function, const char* argument) {
  const pybind11::array array = flat_array(object, function, argument);
  const pybind11::dtype expected = pybind11::dtype::of<Value>();
  if (array.dtype().kind() != expected.kind() || array.dtype().itemsize() != expected.itemsize()) {
    wrong_dtype(array, function, argument, pybind11::str(expected));
  }
  return {static_cast<const Value*>(array.data()), static_cast<std::size_t>(array.size())};
}

/// A CsrView over three arrays. indices may be None where columns are not looked at. Checks types and layout,
/// not what the arrays say.
CsrView csr_of(const pybind11::object& indptr, const pybind11::object& indices, const pybind11::object& data,
               std::int64_t num_genes, const char* function);

/// A numpy array that owns the vector's memory.
template <class Value>
pybind11::array_t<Value> to_array(std::vector<Value> values) {
  auto* owned = new std::vector<Value>(std::move(values));
  const pybind11::capsule owner(owned,
                                [](void* pointer) { delete static_cast<std::vector<Value>*>(pointer); });
  return pybind11::array_t<Value>(static_cast<pybind11::ssize_t>(owned->size()), owned->data(), owner);
}

}  // namespace scfm
